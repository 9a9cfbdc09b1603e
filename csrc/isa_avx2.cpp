// AVX2 without byte products: Haswell to Coffee Lake, Zen 1 to Zen 4 in 256 bits.
#include <immintrin.h>

#include "kernels.h"

namespace tern::avx2 {
namespace {

// Sums of 2 products of u8 and s8 fit 16 bits while no byte exceeds 128.
inline __m256i add_small_products(__m256i sum, __m256i weights, __m256i quads) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, quads);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline __m256i add_products(__m256i sum, __m256i weights, __m256i quads) {
    const __m256i top = _mm256_set1_epi8(char(0x80));
    sum = add_small_products(sum, _mm256_and_si256(weights, top), quads);
    return add_small_products(sum, _mm256_andnot_si256(top, weights), quads);
}

#include "avx2.inl"
#include "elementwise.inl"
#include "multiply.inl"
#include "attention_bytes.inl"
#include "attention.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures& cpu) { return cpu.avx2; }

#include "kernel_table.inl"

}  // namespace
}  // namespace tern::avx2

namespace tern {

constexpr Kernels kAvx2 = avx2::kernel_table("avx2", "256-bit vectors: Haswell, Zen 1 and later");

}  // namespace tern
