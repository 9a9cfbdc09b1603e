// How the processor is told the shapes of its tile registers: the 64 bytes that LDTILECFG reads, palette 1.
// Source: Intel's Software Developer's Manual, volume 2, LDTILECFG.
#pragma once

#include <cstdint>

namespace tern {

constexpr int kTileRegisters = 8;
constexpr int kTileMaxRows = 16;
constexpr int kTileMaxBytes = 64;  // of a row

struct TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;  // where an interrupted load goes on
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};  // of the registers; the second half is reserved
    std::uint8_t rows[16] = {};        // likewise
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace tern
