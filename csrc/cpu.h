// What this processor and the system under it can run. Knows no kernels.
#pragma once

namespace tern {

struct CpuFeatures {
    bool avx2 = false;         // with FMA and F16C: Haswell, Zen 1
    bool avx_vnni = false;     // 256-bit vpdpbusd: Alder Lake, Zen 5
    bool avx512_vnni = false;  // AVX-512 F, BW, DQ, VL and VNNI: Cascade Lake, Zen 4
    bool amx = false;          // AMX-TILE, -INT8 and -BF16 beside them, which the system lets us use: Sapphire Rapids
};

// Asks cpuid, xgetbv for the registers that the system saves, and the system for tile registers, which a process may
// use only once it was granted them. Constant while the process lives.
const CpuFeatures& cpu_features();

}  // namespace tern
