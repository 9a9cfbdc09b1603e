// What attention kernels and those who call them agree on: tiles of a paged cache.
//
//   keys    [blocks, kv_heads, head_dim / unit, block_size, unit]   unit: elements in 4 bytes
//   values  [blocks, kv_heads, block_size, head_dim]
#pragma once

#include <cstdint>

namespace tern {

constexpr int kTile = 256;          // positions visited at once; tiles start at multiples of it
constexpr int kSplit = 4 * kTile;   // positions whose tiles are joined before they join the others
constexpr int kKeyUnitBytes = 4;
constexpr int kLineBytes = 64;      // of a cache line

// Query rows of one key/value head, and up to kTile positions of the cache that each sees from the first on.
struct AttentionTile {
    const float* queries;        // [rows, head_dim], scaled
    std::int64_t rows;
    const std::int32_t* visible;  // [rows]: how many of the positions, at least 1
    std::int64_t count;          // positions
    const void* const* keys;     // the blocks' keys for this head
    const void* const* values;   // the blocks' values for this head
    std::int64_t first_offset;   // of the first position within the first block
    std::int64_t block_size;
    std::int64_t head_dim;       // a multiple of 16
    std::int64_t element_bytes;  // 2: bf16, 4: float32
};

// One layer's cache.
struct Cache {
    char* keys;
    char* values;
    std::int64_t num_blocks, block_size, kv_heads, head_dim, element_bytes;
    std::int64_t head_bytes() const { return block_size * head_dim * element_bytes; }
};

// The sequences of a step, as in tern.model.batch: [sequences + 1], [sequences], [sequences, max_blocks].
struct Sequences {
    const std::int64_t* query_starts;
    const std::int64_t* context_lens;
    const std::int64_t* block_tables;
    std::int64_t count, max_blocks;
};

}  // namespace tern
