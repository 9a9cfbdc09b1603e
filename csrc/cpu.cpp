#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tile_config.h"
#endif

namespace tern {

#if defined(__x86_64__)

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}

bool bit(unsigned word, int position) { return (word >> position) & 1u; }

std::uint64_t saved_registers() {
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (std::uint64_t(high) << 32) | low;
}

// Eight registers of 16 rows of 64 bytes are what palette 1 means everywhere so far.
bool has_known_tiles() {
    const Registers palette = cpuid(0x1d, 1);
    const bool fit = palette.b >> 16 == kTileRegisters && (palette.b & 0xffff) == kTileMaxBytes;
    return fit && (palette.c & 0xffff) == kTileMaxRows;
}

// Linux grants the 8 KB of tile registers, for all threads, to a process that asks; before 5.16 it knows no such call.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

CpuFeatures detect() {
    CpuFeatures found;
    const Registers basic = cpuid(1, 0);
    if (!bit(basic.c, 27)) return found;  // OSXSAVE: without it xgetbv itself is illegal
    const std::uint64_t saved = saved_registers();
    const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
    const Registers extended = cpuid(7, 0), more = cpuid(7, 1);
    const bool fma = bit(basic.c, 12), avx = bit(basic.c, 28), f16c = bit(basic.c, 29);
    found.avx2 = ymm && avx && fma && f16c && bit(extended.b, 5);
    found.avx_vnni = found.avx2 && bit(more.a, 4);
    const bool f = bit(extended.b, 16), dq = bit(extended.b, 17), bw = bit(extended.b, 30), vl = bit(extended.b, 31);
    found.avx512_vnni = found.avx2 && zmm && f && dq && bw && vl && bit(extended.c, 11);
    const bool amx_bf16 = bit(extended.d, 22), amx_tile = bit(extended.d, 24), amx_int8 = bit(extended.d, 25);
    found.amx = found.avx512_vnni && tiles && amx_tile && amx_int8 && amx_bf16 && has_known_tiles() && may_use_tiles();
    return found;
}

}  // namespace

#else

namespace {

CpuFeatures detect() { return {}; }

}  // namespace

#endif

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

}  // namespace tern
