// Plain C++ for any processor: the compiler's own vectors, whatever the build's baseline has.
#include "kernels.h"

namespace tern::portable {
namespace {

constexpr int kTileRows = 2, kTilePanels = 1;
constexpr int kAttendRows = 2, kScoreGroups = 1, kMixVectors = 1;

struct Bytes {
    std::uint8_t b[kPanel * kQuad];
};
struct Lanes {
    std::int32_t v[kPanel];
};
struct Floats {
    float v[kPanel];
};

inline Bytes load(const std::uint8_t* p) {
    Bytes bytes;
    __builtin_memcpy(bytes.b, p, sizeof bytes.b);
    return bytes;
}
inline Bytes low_nibbles(const Bytes& both) {
    Bytes low;
    for (int i = 0; i < kPanel * kQuad; ++i) low.b[i] = both.b[i] & 15;
    return low;
}
inline Bytes high_nibbles(const Bytes& both) {
    Bytes high;
    for (int i = 0; i < kPanel * kQuad; ++i) high.b[i] = both.b[i] >> 4;
    return high;
}
inline Bytes flip_signs(const Bytes& bytes) {
    Bytes flipped;
    for (int i = 0; i < kPanel * kQuad; ++i) flipped.b[i] = bytes.b[i] ^ 0x80;
    return flipped;
}
inline Lanes all(std::int32_t x) {
    Lanes lanes;
    for (int i = 0; i < kPanel; ++i) lanes.v[i] = x;
    return lanes;
}
inline Lanes operator+(const Lanes& a, const Lanes& b) {
    Lanes lanes;
    for (int i = 0; i < kPanel; ++i) lanes.v[i] = a.v[i] + b.v[i];
    return lanes;
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
    Lanes lanes;
    for (int i = 0; i < kPanel; ++i) lanes.v[i] = a.v[i] * b.v[i];
    return lanes;
}
inline Lanes dot(const Lanes& sum, const Bytes& weights, std::int32_t quad) {
    std::int8_t x[kQuad];
    __builtin_memcpy(x, &quad, sizeof x);
    Lanes lanes;
    for (int i = 0; i < kPanel; ++i) {
        const std::uint8_t* w = weights.b + i * kQuad;
        lanes.v[i] = sum.v[i] + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
    }
    return lanes;
}
inline Lanes dot_small(const Lanes& sum, const Bytes& weights, std::int32_t quad) { return dot(sum, weights, quad); }
inline Lanes load_factors(const std::uint8_t* p) {
    Lanes lanes;
    for (int i = 0; i < kPanel; ++i) {
        const std::int32_t code = i < kFactorBytes ? p[i] & 15 : p[i - kFactorBytes] >> 4;
        lanes.v[i] = code - 8 + (code >= 8);
    }
    return lanes;
}
inline void unpack(const Bytes& both, const Lanes& factors, std::uint8_t* low, std::uint8_t* high) {
    for (int i = 0; i < kPanel * kQuad; ++i) {
        const std::int32_t factor = factors.v[i / kQuad];
        low[i] = std::uint8_t(((both.b[i] & 15) - 8) * factor + 64);
        high[i] = std::uint8_t(((both.b[i] >> 4) - 8) * factor + 64);
    }
}
inline Floats zero() {
    Floats floats;
    for (int i = 0; i < kPanel; ++i) floats.v[i] = 0.0f;
    return floats;
}
inline Floats to_floats(const Lanes& lanes) {
    Floats floats;
    for (int i = 0; i < kPanel; ++i) floats.v[i] = float(lanes.v[i]);
    return floats;
}
inline Floats plus(const Floats& a, const Floats& b) {
    Floats floats;
    for (int i = 0; i < kPanel; ++i) floats.v[i] = a.v[i] + b.v[i];
    return floats;
}
inline Floats times(const Floats& a, float b) {
    Floats floats;
    for (int i = 0; i < kPanel; ++i) floats.v[i] = a.v[i] * b;
    return floats;
}
inline Floats times(const Floats& a, const float* b) {
    Floats floats;
    for (int i = 0; i < kPanel; ++i) floats.v[i] = a.v[i] * b[i];
    return floats;
}
inline Floats load_floats(const float* p) {
    Floats floats;
    __builtin_memcpy(floats.v, p, sizeof floats.v);
    return floats;
}
inline float widened(std::uint32_t high) {
    float wide;
    __builtin_memcpy(&wide, &high, sizeof wide);
    return wide;
}
inline Floats load_narrow(const std::uint16_t* p) {
    Floats floats;
    for (int i = 0; i < kPanel; ++i) floats.v[i] = widened(std::uint32_t(p[i]) << 16);
    return floats;
}
inline void even_odd(const char* p, Floats& even, Floats& odd) {
    std::uint16_t pairs[2 * kPanel];
    __builtin_memcpy(pairs, p, sizeof pairs);
    for (int i = 0; i < kPanel; ++i) {
        even.v[i] = widened(std::uint32_t(pairs[2 * i]) << 16);
        odd.v[i] = widened(std::uint32_t(pairs[2 * i + 1]) << 16);
    }
}
inline Floats times_plus(const Floats& x, float y, const Floats& sum) { return plus(sum, times(x, y)); }
inline Floats add_product(const Floats& x, const Floats& y, const Floats& sum) { return plus(sum, times(x, y.v)); }
inline void store(float* p, const Floats& floats) { __builtin_memcpy(p, floats.v, sizeof floats.v); }

#include "elementwise.inl"
#include "multiply.inl"
#include "attention_bytes.inl"
#include "attention.inl"
#include "pack.inl"

bool runs_on(const CpuFeatures&) { return true; }

#include "kernel_table.inl"

}  // namespace
}  // namespace tern::portable

namespace tern {

constexpr Kernels kPortable = portable::kernel_table("portable", "plain C++, any processor");

}  // namespace tern
