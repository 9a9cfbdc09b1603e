// What attention kernels and those who call them agree on: tiles of a paged cache.
//
//   keys    [kv_heads, blocks, width / unit, block_size, unit]       unit: elements in 4 bytes
//   values  [kv_heads, blocks, block_size / rows, width, rows]       rows: 4 where elements are int8, else 1
//
// width: the head's, and with int8 four more: the bytes of a token's float32 scale in this head. They are the key's last
// unit; of the values of four tokens the last 16 bytes are their scales, one behind the other. So the bytes that one
// vpdpbusd adds up lie together: four of a key along the head, four values of neighbouring tokens.
#pragma once

#include <cstdint>

namespace tern {

constexpr int kTile = 256;          // positions visited at once; tiles start at multiples of it
constexpr int kSplit = 4 * kTile;   // positions whose tiles are joined before they join the others
constexpr int kKeyUnitBytes = 4;
constexpr int kLineBytes = 64;      // of a cache line
constexpr int kFineLevels = 127 * 256;   // to each side of zero: 256 * high + low

// A token's bytes in one head's keys or values.
static inline std::int64_t row_bytes(std::int64_t head_dim, std::int64_t element_bytes) {
    return head_dim * element_bytes + (element_bytes == 1 ? std::int64_t(sizeof(float)) : 0);
}

// Rows of numbers as integers, scale * (256 * high + low), and the sums of each row's halves.
struct RowIntegers {
    std::int8_t* halves[2];  // [rows, width]: high, low
    std::int32_t* sums[2];   // [rows]
    float* scales;           // [rows]
    RowIntegers from(std::int64_t row, std::int64_t width) const {
        return {{halves[0] + row * width, halves[1] + row * width}, {sums[0] + row, sums[1] + row}, scales + row};
    }
};

// Query rows of one key/value head, and up to kTile positions of the cache that each sees from the first on.
struct AttentionTile {
    const float* queries;        // [rows, head_dim], scaled
    RowIntegers query_integers;  // the same, where the cache is int8
    RowIntegers weights;         // [rows, kTile], room for the weights of int8 values
    const char** value_quads;    // [kTile / 4], room for where those lie
    std::int64_t rows;
    const std::int32_t* visible;  // [rows]: how many of the positions, at least 1
    std::int64_t count;          // positions
    const void* const* keys;     // the blocks' keys for this head
    const void* const* values;   // the blocks' values for this head
    std::int64_t first_offset;   // of the first position within the first block
    std::int64_t block_size;
    std::int64_t head_dim;       // a multiple of 16
    std::int64_t element_bytes;  // 1: int8, 2: bf16, 4: float32
    std::int64_t row_bytes() const { return tern::row_bytes(head_dim, element_bytes); }
};

// One layer's cache.
struct Cache {
    char* keys;
    char* values;
    std::int64_t num_blocks, block_size, kv_heads, head_dim, element_bytes;
    std::int64_t row_bytes() const { return tern::row_bytes(head_dim, element_bytes); }
    std::int64_t head_bytes() const { return block_size * row_bytes(); }
};

// The sequences of a step, as in tern.model.batch: [sequences + 1], [sequences], [sequences, max_blocks].
struct Sequences {
    const std::int64_t* query_starts;
    const std::int64_t* context_lens;
    const std::int64_t* block_tables;
    std::int64_t count, max_blocks;
};

}  // namespace tern
