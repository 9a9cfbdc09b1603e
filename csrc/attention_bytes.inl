// Attention's products with int8 keys and values, included once by each instruction set in a namespace of its own. What
// they are multiplied with, a query or the weights of a tile's positions, is rounded to 15 bits; the products themselves
// are exact. Beside what multiply.inl takes, it stands on
//
//   Bytes    flip_signs(x): the highest bit of every byte, so that int8 becomes what `dot` takes, 128 more

// ROWS rows of one half of integers [width] from `row` on times GROUPS groups of 16 columns of bytes, in quads of `depth`:
// place(g, d) is where the quads of group g at depth d lie, and touch(g, d) is called beside each. The sums go to the rows
// of `output`, `stride` apart: first 256 times those of the high half, then those of the low one are added to them, and all
// is multiplied by the rows' scales.
template <int HALF, int ROWS, int GROUPS, class Place, class Touch>
inline void half_products(const RowIntegers& rows, std::int64_t row, std::int64_t width, std::int64_t depth,
                          const Place& place, const Touch& touch, float* output, std::int64_t stride) {
    const std::int8_t* x = rows.halves[HALF] + row * width;
    Floats total[ROWS][GROUPS];
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) total[r][g] = to_floats(all(-128 * rows.sums[HALF][row + r]));
    for (std::int64_t start = 0; start < depth; start += kSpan) {
        Lanes sum[ROWS][GROUPS];
        for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < GROUPS; ++g) sum[r][g] = all(0);
        const std::int64_t end = smaller(depth, start + kSpan);
        for (std::int64_t d = start; d < end; d += kQuad) {
            Bytes bytes[GROUPS];
            for (int g = 0; g < GROUPS; ++g) {
                bytes[g] = flip_signs(load(reinterpret_cast<const std::uint8_t*>(place(g, d))));
                touch(g, d);
            }
            for (int r = 0; r < ROWS; ++r) {
                const std::int32_t quad = load_quad(x + r * width + d);
                for (int g = 0; g < GROUPS; ++g) sum[r][g] = dot(sum[r][g], bytes[g], quad);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < GROUPS; ++g) total[r][g] = plus(total[r][g], to_floats(sum[r][g]));
    }
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) {
            float* sums = output + r * stride + g * kPanel;
            if constexpr (HALF == 0)
                store(sums, times(total[r][g], 256.0f));
            else
                store(sums, times(plus(load_floats(sums), total[r][g]), rows.scales[row + r]));
        }
}

template <int ROWS, int GROUPS, class Place, class Touch>
inline void byte_products(const RowIntegers& rows, std::int64_t row, std::int64_t width, std::int64_t depth,
                          const Place& place, const Touch& touch, float* output, std::int64_t stride) {
    half_products<0, ROWS, GROUPS>(rows, row, width, depth, place, touch, output, stride);
    half_products<1, ROWS, GROUPS>(rows, row, width, depth, place, [](int, std::int64_t) {}, output, stride);
}

// As `score` in attention.inl.
template <int ROWS, int GROUPS>
inline void score_bytes(const AttentionTile& t, std::int64_t row, const char* const* keys, const std::int64_t* strides,
                        const char* const* ahead, const char* const* values, float* scores) {
    const auto place = [&](int g, std::int64_t d) { return keys[g] + d / kQuad * strides[g]; };
    const auto touch = [&](int g, std::int64_t d) {
        if (row != 0) return;
        __builtin_prefetch(ahead[g] + d / kQuad * strides[g]);
        __builtin_prefetch(values[g] + d / kQuad * kLineBytes, 0, 2);
    };
    float* output = scores + row * kTile;
    byte_products<ROWS, GROUPS>(t.query_integers, row, t.head_dim, t.head_dim, place, touch, output, kTile);
    for (int g = 0; g < GROUPS; ++g) {
        const auto* scales = reinterpret_cast<const float*>(place(g, t.head_dim));
        for (int r = 0; r < ROWS; ++r)
            store(output + r * kTile + g * kPanel, times(load_floats(output + r * kTile + g * kPanel), scales));
    }
}

// Where the values of each four positions begin.
inline void find_quads(const AttentionTile& t) {
    std::int64_t block = 0, offset = t.first_offset;
    for (std::int64_t quad = 0; quad * kQuad < t.count; ++quad, offset += kQuad) {
        if (offset == t.block_size) ++block, offset = 0;
        t.value_quads[quad] = static_cast<const char*>(t.values[block]) + offset * t.row_bytes();
    }
}

// The weights [rows, kTile] times the values' scales, as integers, with zeros up to a whole quad.
inline void quantise_weights(const AttentionTile& t, float* weights) {
    find_quads(t);
    float scales[kTile];
    for (std::int64_t i = 0; i < t.count; i += kQuad)
        __builtin_memcpy(scales + i, t.value_quads[i / kQuad] + t.head_dim * kQuad, kQuad * sizeof(float));
    const std::int64_t whole = (t.count + kQuad - 1) / kQuad * kQuad;
    for (std::int64_t row = 0; row < t.rows; ++row) {
        float* w = weights + row * kTile;
        for (std::int64_t i = 0; i < t.visible[row]; ++i) w[i] *= scales[i];
        for (std::int64_t i = t.count; i < whole; ++i) w[i] = 0.0f;
        quantise_finely(w, whole, t.weights.from(row, kTile));
    }
}

// As `mix` in attention.inl.
template <int ROWS, int VECTORS>
inline void mix_bytes(const AttentionTile& t, std::int64_t row, std::int64_t column, float* mixed) {
    const char* const* quads = t.value_quads;
    const std::int64_t offset = column * kQuad;
    const auto place = [=](int v, std::int64_t d) { return quads[d / kQuad] + offset + v * kPanel * kQuad; };
    const auto touch = [](int, std::int64_t) {};
    float* output = mixed + row * t.head_dim + column;
    byte_products<ROWS, VECTORS>(t.weights, row, kTile, t.count, place, touch, output, t.head_dim);
}
