// Attention of some query rows over one tile of cached keys and values, included once by each instruction set in a
// namespace of its own. Beside what multiply.inl takes, it stands on
//
//   Floats   load_floats(p); load_narrow(p): 16 bf16; even_odd(p, even, odd): 16 pairs of bf16, taken apart;
//            times_plus(x, y, sum) = sum + x * y with a float y, add_product(x, y, sum) with a vector y; rounded once or
//            twice
//   kAttendRows, kScoreGroups, kMixVectors: tiles whose accumulators fit the registers
//
// attention_bytes.inl, which has the products with int8 keys and values, stands before it.
//
// A row's numbers come out alike whichever rows stand beside it.

// The keys of 16 positions from `position` on, for one head: units of 4 bytes, [head_dim / unit] x stride bytes.
// Positions that do not lie side by side in one block are brought together in `together`.
inline const char* key_group(const AttentionTile& t, std::int64_t position, char* together, std::int64_t& stride) {
    const std::int64_t place = t.first_offset + position, offset = place % t.block_size;
    if (offset + kPanel <= t.block_size) {
        stride = t.block_size * kKeyUnitBytes;
        return static_cast<const char*>(t.keys[place / t.block_size]) + offset * kKeyUnitBytes;
    }
    const std::int64_t units = t.row_bytes() / kKeyUnitBytes;
    const std::int64_t count = smaller(kPanel, t.count - position);
    stride = kPanel * kKeyUnitBytes;
    for (std::int64_t i = 0; i < kPanel; ++i) {
        const std::int64_t from = place + smaller(i, count - 1);
        const char* block = static_cast<const char*>(t.keys[from / t.block_size]) + from % t.block_size * kKeyUnitBytes;
        for (std::int64_t unit = 0; unit < units; ++unit)
            __builtin_memcpy(together + unit * stride + i * kKeyUnitBytes, block + unit * t.block_size * kKeyUnitBytes,
                             kKeyUnitBytes);
    }
    return together;
}

// Where the keys of 16 positions and their values lie, if that is in one block; else any place that may be read.
inline void place_of(const AttentionTile& t, std::int64_t position, const char*& keys, const char*& values) {
    const std::int64_t place = smaller(t.first_offset + position, t.first_offset + t.count - 1);
    const std::int64_t block = place / t.block_size, offset = place % t.block_size;
    keys = static_cast<const char*>(t.keys[block]) + offset * kKeyUnitBytes;
    values = static_cast<const char*>(t.values[block]) + offset * t.row_bytes();
}

// Products of ROWS queries with GROUPS groups of 16 keys. Beside each pair of numbers that is multiplied, a line of the
// keys after these and one of the values of these is asked for: `ahead` and `values` point to them.
template <int ROWS, int GROUPS>
inline void score(const AttentionTile& t, std::int64_t row, const char* const* keys, const std::int64_t* strides,
                  const char* const* ahead, const char* const* values, float* scores) {
    Floats sum[ROWS][GROUPS];
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) sum[r][g] = zero();
    const float* q = t.queries + row * t.head_dim;
    if (t.element_bytes == 2) {
        for (std::int64_t d = 0; d < t.head_dim; d += 2) {
            Floats even[GROUPS], odd[GROUPS];
            for (int g = 0; g < GROUPS; ++g) {
                even_odd(keys[g] + d / 2 * strides[g], even[g], odd[g]);
                if (row == 0) {
                    __builtin_prefetch(ahead[g] + d / 2 * strides[g]);
                    __builtin_prefetch(values[g] + d / 2 * kLineBytes, 0, 2);
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int g = 0; g < GROUPS; ++g) {
                    sum[r][g] = times_plus(even[g], q[r * t.head_dim + d], sum[r][g]);
                    sum[r][g] = times_plus(odd[g], q[r * t.head_dim + d + 1], sum[r][g]);
                }
        }
    } else {
        for (std::int64_t d = 0; d < t.head_dim; ++d) {
            Floats key[GROUPS];
            for (int g = 0; g < GROUPS; ++g) key[g] = load_floats(reinterpret_cast<const float*>(keys[g] + d * strides[g]));
            for (int r = 0; r < ROWS; ++r)
                for (int g = 0; g < GROUPS; ++g) sum[r][g] = times_plus(key[g], q[r * t.head_dim + d], sum[r][g]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) store(scores + (row + r) * kTile + g * kPanel, sum[r][g]);
}

template <int ROWS, int GROUPS>
inline void score_any(const AttentionTile& t, std::int64_t row, const char* const* keys, const std::int64_t* strides,
                      const char* const* ahead, const char* const* values, float* scores) {
    if (t.element_bytes == 1)
        score_bytes<ROWS, GROUPS>(t, row, keys, strides, ahead, values, scores);
    else
        score<ROWS, GROUPS>(t, row, keys, strides, ahead, values, scores);
}

template <int ROWS, int GROUPS>
inline void score_rest(const AttentionTile& t, std::int64_t row, const char* const* keys, const std::int64_t* strides,
                       const char* const* ahead, const char* const* values, float* scores) {
    if constexpr (ROWS > 0) {
        if (t.rows - row == ROWS)
            score_any<ROWS, GROUPS>(t, row, keys, strides, ahead, values, scores);
        else
            score_rest<ROWS - 1, GROUPS>(t, row, keys, strides, ahead, values, scores);
    }
}

template <int GROUPS>
inline void score_groups(const AttentionTile& t, std::int64_t position, char* together, float* scores) {
    const char *keys[GROUPS], *ahead[GROUPS], *values[GROUPS], *unused;
    std::int64_t strides[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        keys[g] = key_group(t, position + g * kPanel, together + g * kPanel * t.row_bytes(), strides[g]);
        place_of(t, position + g * kPanel, unused, values[g]);
        place_of(t, position + (GROUPS + g) * kPanel, ahead[g], unused);
    }
    std::int64_t row = 0;
    for (; row + kAttendRows <= t.rows; row += kAttendRows)
        score_any<kAttendRows, GROUPS>(t, row, keys, strides, ahead, values, scores + position);
    score_rest<kAttendRows - 1, GROUPS>(t, row, keys, strides, ahead, values, scores + position);
}

// scores [kTile] of the first `visible` positions -> their weights e^(score - highest), zeros up to `count`.
inline void weigh(float* scores, std::int64_t visible, std::int64_t count, float& highest, float& total) {
    const float largest = largest_of(scores, visible);
    for (std::int64_t i = 0; i < visible; ++i) scores[i] -= largest;
    total = exponentials(scores, visible);
    for (std::int64_t i = visible; i < count; ++i) scores[i] = 0.0f;
    highest = largest;
}

// VECTORS vectors of the weighted sum of values, for ROWS rows.
template <int ROWS, int VECTORS>
inline void mix(const AttentionTile& t, std::int64_t row, std::int64_t column, const float* weights, float* mixed) {
    Floats sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = zero();
    const float* w = weights + row * kTile;
    std::int64_t block = t.first_offset / t.block_size, offset = t.first_offset % t.block_size;
    for (std::int64_t position = 0; position < t.count; ++block, offset = 0) {
        const std::int64_t end = smaller(t.count, position + t.block_size - offset);
        const char* values =
            static_cast<const char*>(t.values[block]) + offset * t.row_bytes() + column * t.element_bytes;
        for (; position < end; ++position, values += t.row_bytes()) {
            Floats value[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const char* p = values + v * kPanel * t.element_bytes;
                value[v] = t.element_bytes == 2 ? load_narrow(reinterpret_cast<const std::uint16_t*>(p))
                                                : load_floats(reinterpret_cast<const float*>(p));
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v)
                    sum[r][v] = times_plus(value[v], w[r * kTile + position], sum[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(mixed + (row + r) * t.head_dim + column + v * kPanel, sum[r][v]);
}

template <int ROWS, int VECTORS>
inline void mix_any(const AttentionTile& t, std::int64_t row, std::int64_t column, const float* weights, float* mixed) {
    if (t.element_bytes == 1)
        mix_bytes<ROWS, VECTORS>(t, row, column, mixed);
    else
        mix<ROWS, VECTORS>(t, row, column, weights, mixed);
}

template <int ROWS, int VECTORS>
inline void mix_rest(const AttentionTile& t, std::int64_t row, std::int64_t column, const float* weights, float* mixed) {
    if constexpr (ROWS > 0) {
        if (t.rows - row == ROWS)
            mix_any<ROWS, VECTORS>(t, row, column, weights, mixed);
        else
            mix_rest<ROWS - 1, VECTORS>(t, row, column, weights, mixed);
    }
}

template <int VECTORS>
inline void mix_columns(const AttentionTile& t, std::int64_t column, const float* weights, float* mixed) {
    std::int64_t row = 0;
    for (; row + kAttendRows <= t.rows; row += kAttendRows) mix_any<kAttendRows, VECTORS>(t, row, column, weights, mixed);
    mix_rest<kAttendRows - 1, VECTORS>(t, row, column, weights, mixed);
}

void attend_tile(const AttentionTile& t, float* scores, char* together, float* highest, float* total, float* mixed) {
    std::int64_t position = 0;
    for (; position + kScoreGroups * kPanel <= t.count; position += kScoreGroups * kPanel)
        score_groups<kScoreGroups>(t, position, together, scores);
    for (; position < t.count; position += kPanel) score_groups<1>(t, position, together, scores);
    for (std::int64_t row = 0; row < t.rows; ++row)
        weigh(scores + row * kTile, t.visible[row], t.count, highest[row], total[row]);
    if (t.element_bytes == 1) quantise_weights(t, scores);
    std::int64_t column = 0;
    for (; column + kMixVectors * kPanel <= t.head_dim; column += kMixVectors * kPanel)
        mix_columns<kMixVectors>(t, column, scores, mixed);
    for (; column < t.head_dim; column += kPanel) mix_columns<1>(t, column, scores, mixed);
}

// The attention over two sets of positions together, from that over each: `other` is added to what stands in the first.
void join(const float* other_mixed, float other_highest, float other_total, std::int64_t head_dim, float* mixed,
          float& highest, float& total) {
    const float top = other_highest > highest ? other_highest : highest;
    const float keep = exp_of_negative(highest - top), add = exp_of_negative(other_highest - top);
    for (std::int64_t d = 0; d < head_dim; ++d) mixed[d] = mixed[d] * keep + other_mixed[d] * add;
    total = total * keep + other_total * add;
    highest = top;
}

float dot(const float* x, const float* y, std::int64_t count) {
    Floats sums[2] = {zero(), zero()};
    std::int64_t i = 0;
    for (; i + 2 * kPanel <= count; i += 2 * kPanel)
        for (int half = 0; half < 2; ++half)
            sums[half] = add_product(load_floats(x + i + half * kPanel), load_floats(y + i + half * kPanel), sums[half]);
    float lanes[kPanel];
    store(lanes, plus(sums[0], sums[1]));
    for (int lane = 0; i < count; ++i, lane = (lane + 1) % kPanel) lanes[lane] += x[i] * y[i];
    return add_lanes(lanes);
}
