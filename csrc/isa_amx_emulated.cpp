// What isa_amx.cpp computes, with emulated tile registers: slow, and last in the list, so that it runs only where a
// test asks for it.
#include <immintrin.h>

#include "emulated_tiles.h"
#include "kernels.h"

namespace tern::amx_emulated {
namespace {

inline void configure(const TileConfig& config) { emulated_tiles().configure(config); }
inline void release() { emulated_tiles().release(); }
template <int T>
inline void clear() {
    emulated_tiles().clear(T);
}
template <int T>
inline void load_tile(const void* p, std::int64_t stride) {
    emulated_tiles().load(T, p, stride);
}
template <int T>
inline void store_tile(void* p, std::int64_t stride) {
    emulated_tiles().store(T, p, stride);
}
template <int C, int A, int B>
inline void add_products() {
    emulated_tiles().add_products(C, A, B);
}
template <int C, int A, int B>
inline void add_pairs() {
    emulated_tiles().add_pairs(C, A, B);
}

#include "avx512.inl"
#include "elementwise.inl"
#include "multiply.inl"
#include "attention_bytes.inl"
#include "attention.inl"
#include "multiply_tiles.inl"
#include "attention_tiles.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures& cpu) { return cpu.avx512_vnni; }

#include "kernel_table.inl"
#include "with_tiles.inl"

}  // namespace
}  // namespace tern::amx_emulated

namespace tern {

constexpr Kernels kAmxEmulated = amx_emulated::with_tiles(
    amx_emulated::kernel_table("amx-emulated", "the AMX kernels on emulated tiles, for tests: any AVX-512 VNNI, slow"));

}  // namespace tern
