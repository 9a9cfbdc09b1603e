// AVX-512 with VNNI: Cascade Lake, Ice Lake, Sapphire Rapids; Zen 4, Zen 5.
#include <immintrin.h>

#include "kernels.h"

namespace tern::avx512_vnni {
namespace {

#include "avx512.inl"
#include "elementwise.inl"
#include "multiply.inl"
#include "attention_bytes.inl"
#include "attention.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures& cpu) { return cpu.avx512_vnni; }

#include "kernel_table.inl"

}  // namespace
}  // namespace tern::avx512_vnni

namespace tern {

constexpr Kernels kAvx512Vnni =
    avx512_vnni::kernel_table("avx512-vnni", "512-bit vectors with byte products: Cascade Lake, Ice Lake, Zen 4 and later");

}  // namespace tern
