// Products of many rows in tile registers: the body that AMX and its emulation share, included once by each in a
// namespace of its own, after multiply.inl, whose panels of bytes it reads and whose results it repeats bit for bit.
//
// Before it stand, for tile registers T, C, A, B (numbers known to the compiler):
//   configure(config), release()   the thread's registers, from here to there
//   clear<T>(), load_tile<T>(p, stride), store_tile<T>(p, stride)
//   add_products<C, A, B>()        int32 sums C += rows A of s8 times 16 quads B of 16 columns of u8
// and load_lanes(p) beside the vectors of multiply.inl.
//
// Registers 0..3 are the sums of two tiles of rows (0, 1 and 2, 3) times two panels; 4, 5 are the rows' activations, 6
// and 7 the panels' weights: 64 depths of a panel of bytes are a tile as they lie. A register is loaded for two products,
// so loads keep up with them from the first-level cache. There a span of kUnpackedPanels panels (16 KB) stays for
// kTilesABlock tiles of rows, beside two of those (8 KB), the sums (4 KB) and the totals in the output.

constexpr int kTileDepth = kTileMaxBytes;
constexpr int kTilesABlock = 4;
constexpr int kSumStride = 2 * kPanel;

struct TiledProduct {
    const Activations& x;
    const std::uint8_t* bytes;  // [panels, depth / 4, 16, 4]
    std::int64_t panels;
    const float* scales;  // of the panels
    float* output;
    std::int64_t stride;
    std::int64_t tile_rows;  // of every tile; the last one's may reach up to kRowsBeyond past the last row
};

// The products of up to two tiles of rows with up to two panels over one span.
struct TileBlock {
    std::int64_t row, rows, panel, panels, span;
};

// The block's sums, less OFFSET, times the rows' scales, into the output.
template <int OFFSET>
inline void add_span(const TiledProduct& product, const TileBlock& block, const std::int32_t* sums) {
    const std::int64_t num_spans = spans(product.x.depth), first = block.panel * kPanel;
    const bool last = block.span + 1 == num_spans;
    for (std::int64_t r = 0; r < block.rows; ++r) {
        const std::int64_t place = (block.row + r) * num_spans + block.span;
        const Lanes start = all(-OFFSET * product.x.span_sums[place]);
        const float scale = product.x.scales[place];
        float* output = product.output + (block.row + r) * product.stride + first;
        for (std::int64_t p = 0; p < block.panels; ++p, output += kPanel) {
            const Floats part = times(to_floats(start + load_lanes(sums + r * kSumStride + p * kPanel)), scale);
            const Floats total = plus(block.span == 0 ? zero() : load_floats(output), part);
            store(output, last ? times(total, product.scales + first + p * kPanel) : total);
        }
    }
}

// The block's sums -> `sums`. While the tiles multiply, the vectors take the sums of the block before it from there.
template <int OFFSET, int TALL, int WIDE>
inline void multiply_block(const TiledProduct& product, const TileBlock& block, const TileBlock& before,
                           std::int32_t* sums) {
    const std::int64_t depth = product.x.depth, panel_bytes = kPanel * depth;
    const std::int64_t end = smaller(depth, (block.span + 1) * kSpan);
    const std::int8_t* rows = product.x.values + block.row * depth;
    const std::uint8_t* panel = product.bytes + block.panel * panel_bytes;
    clear<0>();
    if constexpr (WIDE == 2) clear<1>();
    if constexpr (TALL == 2) clear<2>();
    if constexpr (TALL == 2 && WIDE == 2) clear<3>();
    for (std::int64_t k = block.span * kSpan; k < end; k += kTileDepth) {
        load_tile<6>(panel + k * kPanel, kPanel * kQuad);
        load_tile<4>(rows + k, depth);
        add_products<0, 4, 6>();
        if constexpr (WIDE == 2) load_tile<7>(panel + panel_bytes + k * kPanel, kPanel * kQuad);
        if constexpr (WIDE == 2) add_products<1, 4, 7>();
        if constexpr (TALL == 2) load_tile<5>(rows + product.tile_rows * depth + k, depth);
        if constexpr (TALL == 2) add_products<2, 5, 6>();
        if constexpr (TALL == 2 && WIDE == 2) add_products<3, 5, 7>();
    }
    add_span<OFFSET>(product, before, sums);
    constexpr std::int64_t stride = kSumStride * sizeof(std::int32_t);
    std::int32_t* lower = sums + product.tile_rows * kSumStride;
    store_tile<0>(sums, stride);
    if constexpr (WIDE == 2) store_tile<1>(sums + kPanel, stride);
    if constexpr (TALL == 2) store_tile<2>(lower, stride);
    if constexpr (TALL == 2 && WIDE == 2) store_tile<3>(lower + kPanel, stride);
}

template <int OFFSET>
void multiply_tiles(const TiledProduct& product) {
    alignas(64) std::int32_t sums[2 * kTileMaxRows * kSumStride];
    const std::int64_t rows = product.x.rows, num_spans = spans(product.x.depth);
    const std::int64_t block_rows = kTilesABlock * product.tile_rows;
    TileBlock before{0, 0, 0, 0, 0};
    for (std::int64_t first = 0; first < rows; first += block_rows)
        for (std::int64_t span = 0; span < num_spans; ++span)
            for (std::int64_t row = first; row < smaller(rows, first + block_rows); row += 2 * product.tile_rows)
                for (std::int64_t panel = 0; panel < product.panels; panel += 2) {
                    const TileBlock block{row, smaller(rows - row, 2 * product.tile_rows), panel,
                                          smaller(product.panels - panel, 2), span};
                    const bool tall = block.rows > product.tile_rows, wide = block.panels == 2;
                    const auto run = tall ? wide ? multiply_block<OFFSET, 2, 2> : multiply_block<OFFSET, 2, 1>
                                          : wide ? multiply_block<OFFSET, 1, 2> : multiply_block<OFFSET, 1, 1>;
                    run(product, block, before, sums);
                    before = block;
                }
    add_span<OFFSET>(product, before, sums);
}

// Registers 0, 1 and 4 have `upper` rows, 2, 3 and 5 `lower` ones, 6 and 7 all there can be.
TileConfig tile_config(std::int64_t upper, std::int64_t lower) {
    TileConfig config;
    for (int tile = 0; tile < kTileRegisters; ++tile) config.row_bytes[tile] = kTileMaxBytes;
    config.rows[0] = config.rows[1] = config.rows[4] = std::uint8_t(upper);
    config.rows[2] = config.rows[3] = config.rows[5] = std::uint8_t(lower);
    config.rows[6] = config.rows[7] = kTileMaxRows;
    return config;
}

// Rows of a tile where as few as can be hold all rows, each as low as it can be: products take as long as it has rows.
inline std::int64_t tile_height(std::int64_t rows) {
    const std::int64_t tiles = (rows + kTileMaxRows - 1) / kTileMaxRows;
    return (rows + tiles - 1) / tiles;
}

// As multiply, which does what tiles gain nothing at: few rows wait for their weights, not for products.
void multiply_many(const Activations& x, const PackedWeight& w, std::int64_t first_panel, std::int64_t last_panel,
                   float* output, std::int64_t stride, std::uint8_t* scratch) {
    if (x.rows <= kFewRows || w.depth % kTileDepth != 0)
        return multiply(x, w, first_panel, last_panel, output, stride, scratch);
    const std::int64_t tile_rows = tile_height(x.rows);
    const std::int64_t value_bytes = kPanel * w.depth * w.bits / 8, factor_bytes = w.depth / kGroup * kFactorBytes;
    configure(tile_config(tile_rows, tile_rows));
    for (std::int64_t panel = first_panel; panel < last_panel; panel += kUnpackedPanels) {
        const std::int64_t count = smaller(last_panel - panel, kUnpackedPanels);
        const std::uint8_t* values = w.values + panel * value_bytes;
        for (std::int64_t p = 0; p < count && w.bits == 4; ++p)
            unpack_panel(values + p * value_bytes, w.factors + (panel + p) * factor_bytes, w.depth,
                         scratch + p * kPanel * w.depth);
        const TiledProduct product{x, w.bits == 4 ? scratch : values, count, w.scales + panel * kPanel,
                                   output + (panel - first_panel) * kPanel, stride, tile_rows};
        if (w.bits == 4)
            multiply_tiles<kUnpackedOffset>(product);
        else
            multiply_tiles<kByteOffset>(product);
    }
    release();
}

std::int32_t peak_of_tiles(std::int64_t rounds) {
    constexpr std::int64_t ops = 2 * kTileMaxRows * kPanel * kTileDepth;  // of a product of tiles
    alignas(64) std::uint8_t bytes[kTileMaxRows * kTileMaxBytes];
    for (int i = 0; i < kTileMaxRows * kTileMaxBytes; ++i) bytes[i] = std::uint8_t(i);
    configure(tile_config(kTileMaxRows, kTileMaxRows));
    clear<0>(), clear<1>(), clear<2>(), clear<3>();
    load_tile<4>(bytes, kTileMaxBytes), load_tile<5>(bytes, kTileMaxBytes);
    load_tile<6>(bytes, kTileMaxBytes), load_tile<7>(bytes, kTileMaxBytes);
    for (std::int64_t done = 0; done < rounds * kPeakOps; done += 4 * ops) {
        add_products<0, 4, 6>();
        add_products<1, 4, 7>();
        add_products<2, 5, 6>();
        add_products<3, 5, 7>();
    }
    store_tile<0>(bytes, kTileMaxBytes);
    release();
    return bytes[0];
}
