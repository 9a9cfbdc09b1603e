// Attention over 256 positions of a bf16 cache in tile registers: what AMX and its emulation put in the place of
// attend_tile, included once by each after attention.inl and multiply_tiles.inl. Beside what those take, it stands on
//
//   add_pairs<C, A, B>()      float32 sums C += rows A of bf16 times 16 pairs B of 16 columns of bf16
//   split(p, high, low)       16 floats at p -> two bf16 each; interleave(a, b, pairs): 16 bf16 of each, side by side
//
// Queries and weights are float32: each is multiplied as the sum of two bf16 numbers, which err by 2^-16 of it at
// most. Keys lie in the cache as a tile wants them: 16 pairs of depths, each of 16 positions. Values are put together in
// pairs of positions first. All rows go this way, one token's as well as a chunk's, so that they come out alike.

constexpr int kTilePairs = kTileMaxBytes / 4;  // of bf16, in a row of a tile
constexpr int kPartBytes = 2;

// Rows of floats, each where it stood split into high parts, then low ones `part_bytes` behind them.
struct SplitRows {
    const char* data;
    std::int64_t count, row_bytes, part_bytes;
};

// Two panels of 16 columns, or one: pair after pair of depths, `strides` bytes apart.
struct PairPanels {
    const char* data[2];
    std::int64_t strides[2];
    std::int64_t pairs;  // a multiple of kTilePairs
    bool wide;
};

// The heights that the tiles have, so that they are told only where they change.
struct TileHeights {
    std::int64_t upper = 0, lower = 0;
    void become(std::int64_t new_upper, std::int64_t new_lower) {
        if (upper == new_upper && lower == new_lower) return;
        upper = new_upper, lower = new_lower;
        configure(tile_config(upper, lower));
    }
};

// Rows [row, row + upper + lower) times the panels -> output, `stride` floats between its rows.
template <int TALL, int WIDE>
inline void multiply_split(const SplitRows& rows, std::int64_t row, std::int64_t upper, const PairPanels& panels,
                           float* output, std::int64_t stride) {
    clear<0>();
    if constexpr (WIDE == 2) clear<1>();
    if constexpr (TALL == 2) clear<2>();
    if constexpr (TALL == 2 && WIDE == 2) clear<3>();
    for (std::int64_t pair = 0; pair < panels.pairs; pair += kTilePairs) {
        load_tile<6>(panels.data[0] + pair * panels.strides[0], panels.strides[0]);
        if constexpr (WIDE == 2) load_tile<7>(panels.data[1] + pair * panels.strides[1], panels.strides[1]);
        for (int part = 0; part < 2; ++part) {
            const char* left = rows.data + row * rows.row_bytes + part * rows.part_bytes + pair * 2 * kPartBytes;
            load_tile<4>(left, rows.row_bytes);
            add_pairs<0, 4, 6>();
            if constexpr (WIDE == 2) add_pairs<1, 4, 7>();
            if constexpr (TALL == 2) load_tile<5>(left + upper * rows.row_bytes, rows.row_bytes);
            if constexpr (TALL == 2) add_pairs<2, 5, 6>();
            if constexpr (TALL == 2 && WIDE == 2) add_pairs<3, 5, 7>();
        }
    }
    const std::int64_t bytes = stride * std::int64_t(sizeof(float));
    output += row * stride;
    store_tile<0>(output, bytes);
    if constexpr (WIDE == 2) store_tile<1>(output + kPanel, bytes);
    if constexpr (TALL == 2) store_tile<2>(output + upper * stride, bytes);
    if constexpr (TALL == 2 && WIDE == 2) store_tile<3>(output + upper * stride + kPanel, bytes);
}

// All rows times the panels. Nothing is written beyond the last row: its tile is as low as what is left.
void multiply_rows(const SplitRows& rows, const PairPanels& panels, TileHeights& heights, float* output,
                   std::int64_t stride) {
    const std::int64_t height = tile_height(rows.count);
    for (std::int64_t row = 0; row < rows.count; row += 2 * height) {
        const std::int64_t upper = smaller(height, rows.count - row), lower = smaller(height, rows.count - row - upper);
        heights.become(upper, lower > 0 ? lower : height);
        const auto run = lower > 0 ? panels.wide ? multiply_split<2, 2> : multiply_split<2, 1>
                                   : panels.wide ? multiply_split<1, 2> : multiply_split<1, 1>;
        run(rows, row, upper, panels, output, stride);
    }
}

inline void split_row(const float* row, std::int64_t count, char* high, char* low) {
    for (std::int64_t i = 0; i < count; i += kPanel) split(row + i, high + i * kPartBytes, low + i * kPartBytes);
}

// Asks for the keys of 16 positions and the values of 16 others.
inline void ask_for(const AttentionTile& t, std::int64_t key_position, std::int64_t value_position) {
    const char *keys, *values, *unused;
    place_of(t, key_position, keys, unused);
    place_of(t, value_position, unused, values);
    for (std::int64_t unit = 0; unit < t.head_dim / 2; ++unit) {
        __builtin_prefetch(keys + unit * t.block_size * kKeyUnitBytes);
        __builtin_prefetch(values + unit * kLineBytes, 0, 2);
    }
}

// Scores [kTile] of every row with all positions; those beyond the last one are of no meaning.
void score_in_tiles(const AttentionTile& t, const SplitRows& queries, TileHeights& heights, char* together,
                    float* scores) {
    for (std::int64_t position = 0; position < t.count; position += 2 * kPanel) {
        PairPanels keys{{}, {}, t.head_dim / 2, position + kPanel < t.count};
        for (int group = 0; group <= int(keys.wide); ++group) {
            const std::int64_t first = position + group * kPanel;
            keys.data[group] = key_group(t, first, together + group * kPanel * t.head_dim * kPartBytes,
                                         keys.strides[group]);
            ask_for(t, first + 2 * kPanel, first);
        }
        multiply_rows(queries, keys, heights, scores + position, kTile);
    }
}

// The values' sum, weighted, for every row: mixed [rows, head_dim]. Weights from t.count to `positions` are zeros.
void mix_in_tiles(const AttentionTile& t, const SplitRows& weights, std::int64_t positions, TileHeights& heights,
                  float* mixed) {
    static constexpr std::uint16_t no_values[2 * kPanel] = {};
    const std::uint16_t* values[kTile];
    std::int64_t block = t.first_offset / t.block_size, offset = t.first_offset % t.block_size;
    for (std::int64_t position = 0; position < t.count; ++position) {
        values[position] = static_cast<const std::uint16_t*>(t.values[block]) + offset * t.head_dim;
        if (++offset == t.block_size) ++block, offset = 0;
    }
    alignas(64) char pairs[kTile / 2 * 2 * kLineBytes];  // [positions / 2, 2 panels, 16, 2]
    const PairPanels panels{{pairs, pairs + kLineBytes}, {2 * kLineBytes, 2 * kLineBytes}, positions / 2, true};
    for (std::int64_t column = 0; column < t.head_dim; column += 2 * kPanel) {
        for (std::int64_t position = 0; position < positions; position += 2) {
            const std::uint16_t* first = position < t.count ? values[position] + column : no_values;
            const std::uint16_t* second = position + 1 < t.count ? values[position + 1] + column : no_values;
            interleave(first, second, pairs + position * kLineBytes);
            interleave(first + kPanel, second + kPanel, pairs + (position + 1) * kLineBytes);
        }
        multiply_rows(weights, panels, heights, mixed + column, t.head_dim);
    }
}

// As attend_tile, which does the other caches.
void attend_in_tiles(const AttentionTile& t, float* scores, char* together, float* highest, float* total,
                     float* mixed) {
    if (t.element_bytes != 2 || t.head_dim % (2 * kPanel) != 0)
        return attend_tile(t, scores, together, highest, total, mixed);
    TileHeights heights;
    char* queries = reinterpret_cast<char*>(mixed);  // until values are mixed nothing else stands there
    const std::int64_t query_bytes = t.head_dim * std::int64_t(sizeof(float)), part_bytes = t.head_dim * kPartBytes;
    for (std::int64_t row = 0; row < t.rows; ++row)
        split_row(t.queries + row * t.head_dim, t.head_dim, queries + row * query_bytes,
                  queries + row * query_bytes + part_bytes);
    score_in_tiles(t, {queries, t.rows, query_bytes, part_bytes}, heights, together, scores);

    const std::int64_t positions = (t.count + 2 * kTilePairs - 1) / (2 * kTilePairs) * (2 * kTilePairs);
    for (std::int64_t row = 0; row < t.rows; ++row) {
        float* ours = scores + row * kTile;
        weigh(ours, t.visible[row], positions, highest[row], total[row]);
        float copy[kTile];
        __builtin_memcpy(copy, ours, std::size_t(positions) * sizeof(float));
        char* split_weights = reinterpret_cast<char*>(ours);
        split_row(copy, positions, split_weights, split_weights + kTile * kPartBytes);
    }
    const SplitRows weights{reinterpret_cast<const char*>(scores), t.rows, kTile * sizeof(float), kTile * kPartBytes};
    mix_in_tiles(t, weights, positions, heights, mixed);
    release();
}
