// Products with packed weights: the body that all instruction sets share, included once by each in a namespace of its own.
//
// Before it stand, for vectors of 16 columns:
//   Bytes    64 bytes: load(p), low_nibbles, high_nibbles
//   Lanes    16 int32: all(x), operator+ and *, dot(acc, bytes, quad) = acc + the 4-term sums of u8 * s8, and dot_small,
//            which may rely on bytes <= 128; load_factors(p)
//   Floats   16 float32: zero(), to_floats(lanes), times(floats, float), plus, times(floats, p), store(p, floats)
//   unpack(bytes, factors, low, high): q * factor + 64 for the two quads of 64 bytes of nibbles
//   kTileRows, kTilePanels: the tile whose accumulators fit the registers
// and elementwise.inl.

constexpr int kByteOffset = 128, kNibbleOffset = 8, kUnpackedOffset = 64;
constexpr int kFewRows = 8;      // up to here nibbles are multiplied as they are read, beyond they are unpacked first
constexpr int kPrefetchBytes = 3072;  // how far ahead of the products weights are asked for, then
constexpr int kBlockRows = 96;   // rows of activations that stay in the second-level cache beside the unpacked panels

inline std::int32_t load_quad(const std::int8_t* p) {
    std::int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return quad;
}

// ROWS rows from `row` on times PANELS panels of bytes: weights of `panels[i]` are its bytes less OFFSET.
template <int ROWS, int PANELS, int OFFSET>
inline void byte_tile(const Activations& x, std::int64_t row, const std::uint8_t* const* panels, const float* scales,
                      float* output, std::int64_t stride) {
    Floats total[ROWS][PANELS];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) total[r][p] = zero();
    const std::int64_t num_spans = spans(x.depth);
    for (std::int64_t span = 0; span < num_spans; ++span) {
        Lanes sum[ROWS][PANELS];
        for (int r = 0; r < ROWS; ++r) {
            const Lanes start = all(-OFFSET * x.span_sums[(row + r) * num_spans + span]);
            for (int p = 0; p < PANELS; ++p) sum[r][p] = start;
        }
        const std::int64_t end = smaller(x.depth, (span + 1) * kSpan);
        for (std::int64_t k = span * kSpan; k < end; k += kQuad) {
            Bytes weights[PANELS];
            for (int p = 0; p < PANELS; ++p) weights[p] = load(panels[p] + k * kPanel);
            for (int r = 0; r < ROWS; ++r) {
                const std::int32_t quad = load_quad(x.values + (row + r) * x.depth + k);
                for (int p = 0; p < PANELS; ++p)
                    sum[r][p] = OFFSET > 64 ? dot(sum[r][p], weights[p], quad) : dot_small(sum[r][p], weights[p], quad);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const float scale = x.scales[(row + r) * num_spans + span];
            for (int p = 0; p < PANELS; ++p) total[r][p] = plus(total[r][p], times(to_floats(sum[r][p]), scale));
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            store(output + (row + r) * stride + p * kPanel, times(total[r][p], scales + p * kPanel));
}

template <int ROWS, int PANELS, int OFFSET>
inline void byte_rest(const Activations& x, std::int64_t row, std::int64_t last_row, const std::uint8_t* const* panels,
                      const float* scales, float* output, std::int64_t stride) {
    if constexpr (ROWS > 0) {
        if (last_row - row == ROWS)
            byte_tile<ROWS, PANELS, OFFSET>(x, row, panels, scales, output, stride);
        else
            byte_rest<ROWS - 1, PANELS, OFFSET>(x, row, last_row, panels, scales, output, stride);
    }
}

// Rows [row, last_row) times PANELS panels.
template <int PANELS, int OFFSET>
void byte_panels(const Activations& x, std::int64_t row, std::int64_t last_row, const std::uint8_t* bytes,
                 const float* scales, float* output, std::int64_t stride) {
    const std::uint8_t* panels[2] = {bytes, bytes + kPanel * x.depth};
    for (; row + kTileRows <= last_row; row += kTileRows)
        byte_tile<kTileRows, PANELS, OFFSET>(x, row, panels, scales, output, stride);
    byte_rest<kTileRows - 1, PANELS, OFFSET>(x, row, last_row, panels, scales, output, stride);
}

// All rows times `num_panels` panels of bytes, a block of rows after the other so that both stay in the cache.
template <int OFFSET>
void multiply_bytes(const Activations& x, const std::uint8_t* bytes, std::int64_t num_panels, const float* scales,
                    float* output, std::int64_t stride) {
    const std::int64_t panel_bytes = kPanel * x.depth;
    for (std::int64_t row = 0; row < x.rows; row += kBlockRows) {
        const std::int64_t last_row = smaller(x.rows, row + kBlockRows);
        std::int64_t panel = 0;
        if constexpr (kTilePanels == 2)
            for (; panel + 2 <= num_panels; panel += 2)
                byte_panels<2, OFFSET>(x, row, last_row, bytes + panel * panel_bytes, scales + panel * kPanel,
                                       output + panel * kPanel, stride);
        for (; panel < num_panels; ++panel)
            byte_panels<1, OFFSET>(x, row, last_row, bytes + panel * panel_bytes, scales + panel * kPanel,
                                   output + panel * kPanel, stride);
    }
}

// ROWS rows times one panel of nibbles, as they are read. The sum over a group is multiplied by the group's factor.
template <int ROWS>
inline void nibble_tile(const Activations& x, const std::uint8_t* values, const std::uint8_t* factors,
                        const float* scales, float* output, std::int64_t stride) {
    const std::int64_t num_spans = spans(x.depth), num_groups = x.depth / kGroup;
    Floats total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = zero();
    for (std::int64_t span = 0; span < num_spans; ++span) {
        Lanes sum[ROWS];
        for (int r = 0; r < ROWS; ++r) sum[r] = all(0);
        const std::int64_t end = smaller(num_groups, (span + 1) * (kSpan / kGroup));
        for (std::int64_t group = span * (kSpan / kGroup); group < end; ++group) {
            const std::uint8_t* nibbles = values + group * kGroupBytes;
            for (int line = 0; line < kGroupBytes; line += kPanel * kQuad)
                __builtin_prefetch(nibbles + kPrefetchBytes + line, 0, 0);
            const Lanes factor = load_factors(factors + group * kFactorBytes);
            Lanes part[ROWS];
            for (int r = 0; r < ROWS; ++r) part[r] = all(-kNibbleOffset * x.group_sums[r * num_groups + group]);
            for (int pair = 0; pair < kGroup / (2 * kQuad); ++pair) {
                const Bytes both = load(nibbles + pair * kPanel * kQuad);
                const Bytes low = low_nibbles(both), high = high_nibbles(both);
                for (int r = 0; r < ROWS; ++r) {
                    const std::int8_t* depth = x.values + r * x.depth + group * kGroup + pair * 2 * kQuad;
                    part[r] = dot_small(part[r], low, load_quad(depth));
                    part[r] = dot_small(part[r], high, load_quad(depth + kQuad));
                }
            }
            for (int r = 0; r < ROWS; ++r) sum[r] = sum[r] + part[r] * factor;
        }
        for (int r = 0; r < ROWS; ++r) total[r] = plus(total[r], times(to_floats(sum[r]), x.scales[r * num_spans + span]));
    }
    for (int r = 0; r < ROWS; ++r) store(output + r * stride, times(total[r], scales));
}

template <int ROWS>
void nibble_panels(const Activations& x, const std::uint8_t* values, const std::uint8_t* factors,
                   std::int64_t num_panels, const float* scales, float* output, std::int64_t stride) {
    const std::int64_t value_bytes = x.depth / kGroup * kGroupBytes, factor_bytes = x.depth / kGroup * kFactorBytes;
    for (std::int64_t panel = 0; panel < num_panels; ++panel)
        nibble_tile<ROWS>(x, values + panel * value_bytes, factors + panel * factor_bytes, scales + panel * kPanel,
                          output + panel * kPanel, stride);
}

// A panel of nibbles as a panel of bytes, less kUnpackedOffset.
void unpack_panel(const std::uint8_t* values, const std::uint8_t* factors, std::int64_t depth, std::uint8_t* bytes) {
    for (std::int64_t group = 0; group < depth / kGroup; ++group) {
        const Lanes factor = load_factors(factors + group * kFactorBytes);
        for (int pair = 0; pair < kGroup / (2 * kQuad); ++pair, values += kPanel * kQuad, bytes += 2 * kPanel * kQuad)
            unpack(load(values), factor, bytes, bytes + kPanel * kQuad);
    }
}

void multiply_nibbles(const Activations& x, const std::uint8_t* values, const std::uint8_t* factors,
                      std::int64_t num_panels, const float* scales, float* output, std::int64_t stride,
                      std::uint8_t* scratch) {
    const std::int64_t value_bytes = x.depth / kGroup * kGroupBytes, factor_bytes = x.depth / kGroup * kFactorBytes;
    if (x.rows > kFewRows) {
        for (std::int64_t panel = 0; panel < num_panels; panel += kUnpackedPanels) {
            const std::int64_t count = smaller(num_panels - panel, kUnpackedPanels);
            for (std::int64_t p = 0; p < count; ++p)
                unpack_panel(values + (panel + p) * value_bytes, factors + (panel + p) * factor_bytes, x.depth,
                             scratch + p * kPanel * x.depth);
            multiply_bytes<kUnpackedOffset>(x, scratch, count, scales + panel * kPanel, output + panel * kPanel, stride);
        }
        return;
    }
    switch (x.rows) {
        case 1: return nibble_panels<1>(x, values, factors, num_panels, scales, output, stride);
        case 2: return nibble_panels<2>(x, values, factors, num_panels, scales, output, stride);
        case 3: return nibble_panels<3>(x, values, factors, num_panels, scales, output, stride);
        case 4: return nibble_panels<4>(x, values, factors, num_panels, scales, output, stride);
        case 5: return nibble_panels<5>(x, values, factors, num_panels, scales, output, stride);
        case 6: return nibble_panels<6>(x, values, factors, num_panels, scales, output, stride);
        case 7: return nibble_panels<7>(x, values, factors, num_panels, scales, output, stride);
        case 8: return nibble_panels<8>(x, values, factors, num_panels, scales, output, stride);
    }
}

void multiply(const Activations& x, const PackedWeight& w, std::int64_t first_panel, std::int64_t last_panel,
              float* output, std::int64_t stride, std::uint8_t* scratch) {
    const std::int64_t num_panels = last_panel - first_panel, num_groups = w.depth / kGroup;
    const float* scales = w.scales + first_panel * kPanel;
    if (w.bits == 4)
        multiply_nibbles(x, w.values + first_panel * num_groups * kGroupBytes,
                         w.factors + first_panel * num_groups * kFactorBytes, num_panels, scales, output, stride,
                         scratch);
    else
        multiply_bytes<kByteOffset>(x, w.values + first_panel * kPanel * w.depth, num_panels, scales, output, stride);
}

std::uint32_t read(const std::uint8_t* bytes, std::int64_t count) {
    constexpr int kStreams = 4, kAhead = 1024;
    Lanes sums[kStreams] = {all(0), all(0), all(0), all(0)};
    const std::int64_t part = count / kStreams;
    for (std::int64_t i = 0; i + kPanel * kQuad <= part; i += kPanel * kQuad)
        for (int s = 0; s < kStreams; ++s) {
            __builtin_prefetch(bytes + s * part + i + kAhead);
            sums[s] = dot_small(sums[s], low_nibbles(load(bytes + s * part + i)), 0x01010101);
        }
    float totals[kPanel];
    store(totals, to_floats(sums[0] + sums[1] + (sums[2] + sums[3])));
    return std::uint32_t(totals[0]);
}

std::int32_t peak(std::int64_t rounds) {
    std::uint8_t bytes[kPanel * kQuad];
    for (int i = 0; i < kPanel * kQuad; ++i) bytes[i] = std::uint8_t(i);
    const Bytes weights = load(bytes);
    Lanes sums[8] = {all(0), all(1), all(2), all(3), all(4), all(5), all(6), all(7)};
    for (std::int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < 8; ++i) sums[i] = dot_small(sums[i], weights, 0x01010101 * (i + 1));
    for (int i = 1; i < 8; ++i) sums[0] = sums[0] + sums[i];
    float totals[kPanel];
    store(totals, to_floats(sums[0]));
    return std::int32_t(totals[0] / 4.0f);
}
