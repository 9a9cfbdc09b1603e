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
#include "attention.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures& cpu) { return cpu.avx_vnni; }

}  // namespace
}  // namespace tern::avx_vnni

namespace tern {

const Kernels kAvxVnni{"avx-vnni",
                       "256-bit vectors with byte products: Alder Lake, Zen 5 and later",
                       avx_vnni::runs_on,
                       avx_vnni::quantise_row,
                       avx_vnni::multiply,
                       avx_vnni::silu_mul,
                       avx_vnni::add_scaled,
                       avx_vnni::widen,
                       avx_vnni::narrow,
                       avx_vnni::dot,
                       avx_vnni::inverse_norm,
                       avx_vnni::rotate,
                       avx_vnni::exponentials,
                       avx_vnni::attend_tile,
                       avx_vnni::join,
                       avx_vnni::read,
                       avx_vnni::peak,
                       avx_vnni::pack_panel};

}  // namespace tern
