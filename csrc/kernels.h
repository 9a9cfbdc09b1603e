// One object per instruction set: its name, what it needs, and its version of every kernel. All versions of a kernel
// give the same result, bit for bit, but those of attention and of `dot`, where some round a product before it is added
// and some do not; tiles multiply what is left of queries and weights after 16 bits.
#pragma once

#include <cstdint>

#include "attention.h"
#include "cpu.h"
#include "packed.h"

namespace tern {

struct Kernels {
    const char* name;
    const char* description;
    bool (*runs_on)(const CpuFeatures&);

    // Quantise one row [depth] of activations: to values [depth], scales [spans], sums over groups and over spans.
    void (*quantise_row)(const float* row, std::int64_t depth, std::int8_t* values, float* scales,
                         std::int32_t* group_sums, std::int32_t* span_sums);

    // Quantise a head's key or value to `values`; the scale is returned. And numbers that are multiplied with such to one
    // row of integers.
    float (*quantise_head)(const float* x, std::int64_t count, std::int8_t* values);
    void (*quantise_finely)(const float* x, std::int64_t count, const RowIntegers& into);

    // All rows of the activations times panels [first_panel, last_panel) of the weight -> output, whose first column is
    // that of the first panel and whose rows are `stride` floats apart. `scratch` holds scratch_bytes(depth).
    void (*multiply)(const Activations&, const PackedWeight&, std::int64_t first_panel, std::int64_t last_panel,
                     float* output, std::int64_t stride, std::uint8_t* scratch);

    // output = silu(gate) * up, elements 0..count-1.
    void (*silu_mul)(const float* gate, const float* up, std::int64_t count, float* output);

    // sum += weight * row, product and sum rounded apart.
    void (*add_scaled)(const float* row, float weight, std::int64_t count, float* sum);

    // bfloat16 <-> float32; halves are rounded to even.
    void (*widen)(const std::uint16_t* narrow, std::int64_t count, float* wide);
    void (*narrow)(const float* wide, std::int64_t count, std::uint16_t* narrow);

    // The sum of x[i] * y[i].
    float (*dot)(const float* x, const float* y, std::int64_t count);

    // 1 / sqrt(mean of x[i]^2 + eps)
    float (*inverse_norm)(const float* x, std::int64_t count, float eps);

    // output = x times cosines + x, neighbours exchanged, times sines.
    void (*rotate)(const float* x, const float* cosines, const float* sines, std::int64_t count, float* output);

    // e^x for x <= 0 in place, and their sum.
    float (*exponentials)(float* x, std::int64_t count);

    // The place of the largest number, the first of equals, and that number itself; NaN is the largest of all.
    std::int64_t (*largest)(const float* x, std::int64_t count, float* peak);

    // Logits become scores (logit - peak) / temperature, minus infinity below `floor`, and `weights` e^score; the sum of
    // the weights is returned.
    float (*weights)(float* logits, std::int64_t count, float peak, float temperature, float floor, float* weights);

    // See attention.inl. `scores` [rows, kTile], `together` 2 x 16 keys, `highest`, `total` [rows], `mixed` [rows, head_dim].
    void (*attend_tile)(const AttentionTile&, float* scores, char* together, float* highest, float* total, float* mixed);
    void (*join)(const float* other_mixed, float other_highest, float other_total, std::int64_t head_dim, float* mixed,
                 float& highest, float& total);

    // What the machine can do at most: a sum over `count` bytes (a multiple of 256), which reads them at the full rate,
    // and `rounds` of products of bytes in registers alone, kPeakOps operations each.
    std::uint32_t (*read)(const std::uint8_t* bytes, std::int64_t count);
    std::int32_t (*peak)(std::int64_t rounds);

    // See pack.inl. Columns [depth] of one panel, `stride` floats apart.
    void (*pack_panel)(const float* columns, std::int64_t stride, std::int64_t depth, int bits, std::uint8_t* values,
                       std::uint8_t* factors, float* scales);
};

constexpr int kPeakOps = 8 * 2 * kPanel * kQuad;
constexpr int kUnpackedPanels = 4;  // nibbles that are unpacked for many rows at a time

// Bytes that multiply may use beside the output, aligned to 64.
static inline std::int64_t scratch_bytes(std::int64_t depth) { return kUnpackedPanels * kPanel * depth; }

extern const Kernels kPortable;
#if defined(TERN_X86_KERNELS)
extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni, kAmxEmulated;
#endif
#if defined(TERN_AMX_KERNELS)
extern const Kernels kAmx;
#endif

}  // namespace tern
