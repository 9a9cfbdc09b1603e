// AVX-VNNI, byte products in 256 bits: Alder Lake and later, Zen 5.
#include <immintrin.h>

#include "kernels.h"

namespace tern::avx_vnni {
namespace {

inline __m256i add_products(__m256i sum, __m256i weights, __m256i quads) {
    return _mm256_dpbusd_avx_epi32(sum, weights, quads);
}
inline __m256i add_small_products(__m256i sum, __m256i weights, __m256i quads) {
    return add_products(sum, weights, quads);
}

#include "avx2.inl"
#include "elementwise.inl"
#include "multiply.inl"
#include "attention_bytes.inl"
#include "attention.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures& cpu) { return cpu.avx_vnni; }

#include "kernel_table.inl"

}  // namespace
}  // namespace tern::avx_vnni

namespace tern {

constexpr Kernels kAvxVnni =
    avx_vnni::kernel_table("avx-vnni", "256-bit vectors with byte products: Alder Lake, Zen 5 and later");

}  // namespace tern
