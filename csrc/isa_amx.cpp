// AMX: products of bytes and of bf16 in tile registers, all else by AVX-512: Sapphire Rapids, Granite Rapids.
#include <immintrin.h>

#include "kernels.h"
#include "tile_config.h"

namespace tern::amx {
namespace {

// Written as assembly: GCC's intrinsics spell the register's number by a macro, which no template can, and GCC 12's do
// not say that a load reads memory.
inline void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { __asm__ volatile("tilerelease"); }
template <int T>
inline void clear() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load_tile(const void* p, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void* p, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void add_products() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void add_pairs() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#include "avx512.inl"
#include "elementwise.inl"
#include "multiply.inl"
#include "attention_bytes.inl"
#include "attention.inl"
#include "multiply_tiles.inl"
#include "attention_tiles.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures& cpu) { return cpu.amx; }

#include "kernel_table.inl"
#include "with_tiles.inl"

}  // namespace
}  // namespace tern::amx

namespace tern {

constexpr Kernels kAmx =
    amx::with_tiles(amx::kernel_table("amx", "tile registers: Sapphire Rapids and later Xeons"));

}  // namespace tern
