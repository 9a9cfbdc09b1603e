// What the sets with AVX-512 and VNNI share: vectors of 16 columns.

constexpr int kTileRows = 12, kTilePanels = 2;  // 24 accumulators of 32 registers
constexpr int kAttendRows = 6, kScoreGroups = 2, kMixVectors = 4;

using Bytes = __m512i;
using Floats = __m512;
struct Lanes {
    __m512i v;
};

inline Bytes load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes both) { return low_nibbles(_mm512_srli_epi16(both, 4)); }
inline Bytes flip_signs(Bytes bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80))); }
inline Lanes load_lanes(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Lanes all(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Lanes dot(Lanes sum, Bytes weights, std::int32_t quad) {
    return {_mm512_dpbusd_epi32(sum.v, weights, _mm512_set1_epi32(quad))};
}
inline Lanes dot_small(Lanes sum, Bytes weights, std::int32_t quad) { return dot(sum, weights, quad); }
inline Lanes load_factors(const std::uint8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i both = _mm_unpacklo_epi64(codes, _mm_srli_epi16(codes, 4));
    const __m128i meaning = _mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8);
    return {_mm512_cvtepi8_epi32(_mm_shuffle_epi8(meaning, _mm_and_si128(both, _mm_set1_epi8(15))))};
}
// A word's two nibbles are multiplied at once: with its offset no byte leaves 0..128, so none borrows from the other.
inline void unpack(Bytes both, Lanes factors, std::uint8_t* low, std::uint8_t* high) {
    const __m512i factor = _mm512_or_si512(_mm512_and_si512(factors.v, _mm512_set1_epi32(0xffff)),
                                           _mm512_slli_epi32(factors.v, 16));
    const __m512i byte_offset = _mm512_sub_epi16(_mm512_set1_epi16(64), _mm512_slli_epi16(factor, 3));
    const __m512i offset = _mm512_or_si512(byte_offset, _mm512_slli_epi16(byte_offset, 8));
    const auto scaled = [&](__m512i nibbles) {
        return _mm512_add_epi16(_mm512_mullo_epi16(nibbles, factor), offset);
    };
    _mm512_storeu_si512(low, scaled(low_nibbles(both)));
    _mm512_storeu_si512(high, scaled(high_nibbles(both)));
}
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats to_floats(Lanes lanes) { return _mm512_cvtepi32_ps(lanes.v); }
inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats times(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
inline Floats times(Floats a, const float* b) { return _mm512_mul_ps(a, _mm512_loadu_ps(b)); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_narrow(const std::uint16_t* p) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
inline void even_odd(const char* p, Floats& even, Floats& odd) {
    const __m512i pairs = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}
// 16 floats as two bf16 each: cut off, and the rest rounded to even. NaN stays NaN in one of them.
inline void split(const float* p, char* high, char* low) {
    const __m512 floats = _mm512_loadu_ps(p);
    const __m512i bits = _mm512_castps_si512(floats), mask = _mm512_set1_epi32(int(0xffff0000));
    const __m512 rest = _mm512_sub_ps(floats, _mm512_castsi512_ps(_mm512_and_si512(bits, mask)));
    const __m512i wide = _mm512_castps_si512(rest);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
inline void interleave(const std::uint16_t* a, const std::uint16_t* b, char* pairs) {
    const auto widened = [](const std::uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    _mm512_storeu_si512(pairs, _mm512_or_si512(widened(a), _mm512_slli_epi32(widened(b), 16)));
}
inline Floats times_plus(Floats x, float y, Floats sum) { return _mm512_fmadd_ps(x, _mm512_set1_ps(y), sum); }
inline Floats add_product(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
inline void store(float* p, Floats floats) { _mm512_storeu_ps(p, floats); }
