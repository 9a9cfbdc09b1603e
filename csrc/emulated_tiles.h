// AMX's tile registers in plain C++, one set a thread: what each instruction does to them, and when the processor would
// refuse it. So that what is written for AMX runs, and is tested, where there is none. Knows no products with weights.
#pragma once

#include <cstdint>

#include "tile_config.h"

namespace tern {

// Every call throws std::logic_error where the instruction would fault: #GP for a configuration that is not legal,
// #UD for registers that are not configured or do not fit each other. Source: Intel's Software Developer's Manual,
// volume 2, and its AMX exception classes E1 to E4.
class EmulatedTiles {
  public:
    // LDTILECFG: all registers become zeros of these shapes. Palette 0 is as release().
    void configure(const TileConfig& config);
    // TILERELEASE
    void release();
    // TILEZERO
    void clear(int tile);
    // TILELOADD, TILESTORED: the register's rows from or to memory, `stride` bytes apart.
    void load(int tile, const void* memory, std::int64_t stride);
    void store(int tile, void* memory, std::int64_t stride) const;
    // TDPBSUD: sums [rows, columns] int32 += a [rows, 4 quads] int8 times b [quads, columns, 4] uint8.
    void add_products(int sums, int a, int b);
    // TDPBF16PS: sums [rows, columns] float32 += a [rows, 2 pairs] bf16 times b [pairs, columns, 2] bf16. The first
    // products of all pairs are added up, then the second ones, then both and what was there; subnormals count as 0.
    void add_pairs(int sums, int a, int b);

    // How often these two were called: tests ask whether tiles have computed something.
    std::int64_t products() const { return products_; }

  private:
    struct Tile {
        int rows = 0, row_bytes = 0;
        std::uint8_t bytes[kTileMaxRows][kTileMaxBytes] = {};
    };
    const Tile& configured(int tile) const;
    void demand_fit(int sums, int a, int b) const;

    std::int64_t products_ = 0;
    bool configured_ = false;
    Tile tiles_[kTileRegisters];
};

// The calling thread's registers.
EmulatedTiles& emulated_tiles();

}  // namespace tern
