// The layout of packed weights and of quantised activations: what kernels, tests and files agree on.
//
// A weight [columns, depth] (the rows of a linear layer's matrix are the columns of its output) is cut into panels of 16
// columns. Depth runs in quads of 4, groups of 32 and spans of 256:
//
//   8 bit   values  [panels, depth / 4, 16, 4]       w + 128 for w in -127..127
//   4 bit   values  [panels, depth / 32, 4, 16, 4]   low nibble q + 8 of quad 2i, high nibble of quad 2i + 1
//           factors [panels, depth / 32, 8]          per group and column a nibble: 0..7 mean -8..-1, 8..15 mean 1..8;
//                                                    low nibbles are the columns 0..7, high nibbles 8..15
//   both    scales  [panels * 16]                    float32; a weight is scale * factor * q, or scale * w
//
// Activations are int8 with one float32 scale per row and span. The sum over a span is exact in int32; spans are added
// up in float32, first to last, product and sum rounded apart. So a result does not depend on who computes it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tern {

constexpr int kPanel = 16;   // columns that are computed together
constexpr int kQuad = 4;     // depths that one vpdpbusd adds up
constexpr int kGroup = 32;   // depths that share a factor
constexpr int kSpan = 256;   // depths that share an activation scale
constexpr float kSmallest = 1e-30f;  // magnitudes up to here count as zero: their inverse would overflow
constexpr int kGroupBytes = kPanel * kGroup / 2;
constexpr int kFactorBytes = kPanel / 2;
constexpr int kRowsBeyond = 15;  // behind the last row of activations that kernels may read: tiles have whole rows

struct PackedWeight {
    int bits;  // 4 or 8
    const std::uint8_t* values;
    const std::uint8_t* factors;  // null if bits is 8
    const float* scales;
    std::int64_t columns;  // a multiple of kPanel
    std::int64_t depth;    // a multiple of kGroup

    std::int64_t panels() const { return columns / kPanel; }
    std::int64_t value_bytes() const { return columns * depth * bits / 8; }
    std::int64_t factor_bytes() const { return bits == 4 ? columns / kPanel * (depth / kGroup) * kFactorBytes : 0; }

    // The weight number `index` of a stack of such weights, of which this is the first.
    PackedWeight at(std::int64_t index) const {
        return {bits, values + index * value_bytes(), factors + index * factor_bytes(), scales + index * columns,
                columns, depth};
    }
};

// Rows of activations, quantised.
struct Activations {
    const std::int8_t* values;       // [rows, depth], then kRowsBeyond rows of anything
    const float* scales;             // [rows, spans]
    const std::int32_t* group_sums;  // [rows, depth / kGroup]
    const std::int32_t* span_sums;   // [rows, spans]
    std::int64_t rows;
    std::int64_t depth;
};

static inline std::int64_t spans(std::int64_t depth) { return (depth + kSpan - 1) / kSpan; }

}  // namespace tern
