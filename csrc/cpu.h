// What this processor and the system under it can run. Knows no kernels.
#pragma once

namespace tern {

struct CpuFeatures {
    bool avx2 = false;         // with FMA and F16C: Haswell, Zen 1
    bool avx_vnni = false;     // 256-bit vpdpbusd: Alder Lake, Zen 5
    bool avx512_vnni = false;  // AVX-512 F, BW, DQ, VL and VNNI: Cascade Lake, Zen 4
};

// Asks cpuid, and xgetbv for the registers that the system saves. Constant while the process lives.
const CpuFeatures& cpu_features();

}  // namespace tern
