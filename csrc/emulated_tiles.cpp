#include "emulated_tiles.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace tern {

namespace {

void demand(bool condition, const char* fault, const std::string& what) {
    if (!condition) throw std::logic_error(std::string(fault) + ": " + what);
}

template <class T, int N>
bool all_zero(const T (&values)[N], int first) {
    for (int i = first; i < N; ++i)
        if (values[i] != 0) return false;
    return true;
}

float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

float bf16(const std::uint8_t* bytes) {
    const std::uint32_t bits = std::uint32_t(bytes[0]) << 16 | std::uint32_t(bytes[1]) << 24;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

std::string shape(int rows, int row_bytes) {
    return std::to_string(rows) + " rows of " + std::to_string(row_bytes) + " bytes";
}

}  // namespace

void EmulatedTiles::configure(const TileConfig& config) {
    const int palette = config.palette;
    demand(palette <= 1, "#GP", "there is no palette " + std::to_string(palette));
    if (palette == 0) return release();
    const bool rest_zero = all_zero(config.row_bytes, kTileRegisters) && all_zero(config.rows, kTileRegisters);
    demand(all_zero(config.reserved, 0) && rest_zero, "#GP", "reserved bytes are not zero");
    demand(config.start_row < kTileMaxRows, "#GP", "no tile has a row " + std::to_string(config.start_row));
    for (int tile = 0; tile < kTileRegisters; ++tile) {
        const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
        const std::string what = "tile " + std::to_string(tile) + " cannot have " + shape(rows, row_bytes);
        demand(rows <= kTileMaxRows && row_bytes <= kTileMaxBytes, "#GP", what);
        demand((rows == 0) == (row_bytes == 0), "#GP", what);
    }
    release();
    for (int tile = 0; tile < kTileRegisters; ++tile) {
        tiles_[tile].rows = config.rows[tile];
        tiles_[tile].row_bytes = config.row_bytes[tile];
    }
    configured_ = true;
}

void EmulatedTiles::release() {
    for (Tile& tile : tiles_) tile = Tile();
    configured_ = false;
}

const EmulatedTiles::Tile& EmulatedTiles::configured(int tile) const {
    demand(0 <= tile && tile < kTileRegisters, "#UD", "there is no tile " + std::to_string(tile));
    demand(configured_, "#UD", "tiles are not configured");
    demand(tiles_[tile].rows > 0, "#UD", "tile " + std::to_string(tile) + " is not configured");
    return tiles_[tile];
}

void EmulatedTiles::clear(int tile) {
    configured(tile);
    std::memset(tiles_[tile].bytes, 0, sizeof tiles_[tile].bytes);
}

void EmulatedTiles::load(int tile, const void* memory, std::int64_t stride) {
    clear(tile);
    Tile& into = tiles_[tile];
    for (int row = 0; row < into.rows; ++row)
        std::memcpy(into.bytes[row], static_cast<const char*>(memory) + row * stride, std::size_t(into.row_bytes));
}

void EmulatedTiles::store(int tile, void* memory, std::int64_t stride) const {
    const Tile& from = configured(tile);
    for (int row = 0; row < from.rows; ++row)
        std::memcpy(static_cast<char*>(memory) + row * stride, from.bytes[row], std::size_t(from.row_bytes));
}

void EmulatedTiles::demand_fit(int sums, int a, int b) const {
    const Tile &left = configured(a), &right = configured(b), &into = configured(sums);
    demand(sums != a && sums != b && a != b, "#UD", "a tile cannot be two operands");
    demand(left.row_bytes % 4 == 0 && right.row_bytes % 4 == 0, "#UD", "rows must be whole quads of bytes");
    const bool fit = into.rows == left.rows && into.row_bytes == right.row_bytes && left.row_bytes / 4 == right.rows;
    demand(fit, "#UD",
           "sums of " + shape(into.rows, into.row_bytes) + " cannot hold products of " +
               shape(left.rows, left.row_bytes) + " and " + shape(right.rows, right.row_bytes));
}

void EmulatedTiles::add_products(int sums, int a, int b) {
    demand_fit(sums, a, b);
    ++products_;
    const Tile &left = tiles_[a], &right = tiles_[b];
    Tile& into = tiles_[sums];
    for (int row = 0; row < into.rows; ++row)
        for (int column = 0; column < into.row_bytes / 4; ++column) {
            std::uint32_t sum;  // wraps around
            std::memcpy(&sum, into.bytes[row] + 4 * column, sizeof sum);
            for (int quad = 0; quad < right.rows; ++quad)
                for (int byte = 0; byte < 4; ++byte)
                    sum += std::uint32_t(std::int8_t(left.bytes[row][4 * quad + byte]) *
                                         int(right.bytes[quad][4 * column + byte]));
            std::memcpy(into.bytes[row] + 4 * column, &sum, sizeof sum);
        }
}

void EmulatedTiles::add_pairs(int sums, int a, int b) {
    demand_fit(sums, a, b);
    ++products_;
    const Tile &left = tiles_[a], &right = tiles_[b];
    Tile& into = tiles_[sums];
    for (int row = 0; row < into.rows; ++row)
        for (int column = 0; column < into.row_bytes / 4; ++column) {
            float parts[2] = {0.0f, 0.0f}, sum;
            std::memcpy(&sum, into.bytes[row] + 4 * column, sizeof sum);
            for (int pair = 0; pair < right.rows; ++pair)
                for (int i = 0; i < 2; ++i) {
                    const float x = bf16(left.bytes[row] + 4 * pair + 2 * i);
                    const float y = bf16(right.bytes[pair] + 4 * column + 2 * i);
                    parts[i] = flushed(parts[i] + x * y);  // the product is exact: as if rounded once
                }
            sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
            std::memcpy(into.bytes[row] + 4 * column, &sum, sizeof sum);
        }
}

EmulatedTiles& emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

}  // namespace tern
