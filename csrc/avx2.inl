// What AVX2 and AVX-VNNI share: vectors of 16 columns as two halves of 8. `add_products(sum, weights, quads)` and
// `add_small_products` stand before it.

struct Bytes {
    __m256i a, b;
};
struct Lanes {
    __m256i a, b;
};
struct Floats {
    __m256 a, b;
};

constexpr int kTileRows = 4, kTilePanels = 1;  // 8 accumulators of 16 registers
constexpr int kAttendRows = 4, kScoreGroups = 1, kMixVectors = 1;

inline Bytes load(const std::uint8_t* p) {
    const auto* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline __m256i low_nibbles(__m256i both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
inline Bytes low_nibbles(const Bytes& both) { return {low_nibbles(both.a), low_nibbles(both.b)}; }
inline Bytes high_nibbles(const Bytes& both) {
    return {low_nibbles(_mm256_srli_epi16(both.a, 4)), low_nibbles(_mm256_srli_epi16(both.b, 4))};
}
inline Bytes flip_signs(const Bytes& bytes) {
    const __m256i top = _mm256_set1_epi8(char(0x80));
    return {_mm256_xor_si256(bytes.a, top), _mm256_xor_si256(bytes.b, top)};
}
inline Lanes all(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Lanes operator+(const Lanes& x, const Lanes& y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline Lanes operator*(const Lanes& x, const Lanes& y) {
    return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}
inline Lanes dot(const Lanes& sum, const Bytes& weights, std::int32_t quad) {
    const __m256i quads = _mm256_set1_epi32(quad);
    return {add_products(sum.a, weights.a, quads), add_products(sum.b, weights.b, quads)};
}
inline Lanes dot_small(const Lanes& sum, const Bytes& weights, std::int32_t quad) {
    const __m256i quads = _mm256_set1_epi32(quad);
    return {add_small_products(sum.a, weights.a, quads), add_small_products(sum.b, weights.b, quads)};
}
inline Lanes load_factors(const std::uint8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i both = _mm_unpacklo_epi64(codes, _mm_srli_epi16(codes, 4));
    const __m128i meaning = _mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8);
    const __m128i factors = _mm_shuffle_epi8(meaning, _mm_and_si128(both, _mm_set1_epi8(15)));
    return {_mm256_cvtepi8_epi32(factors), _mm256_cvtepi8_epi32(_mm_srli_si128(factors, 8))};
}
// A word's two nibbles are multiplied at once: with its offset no byte leaves 0..128, so none borrows from the other.
inline void unpack(__m256i both, __m256i factors, std::uint8_t* low, std::uint8_t* high) {
    const __m256i factor =
        _mm256_or_si256(_mm256_and_si256(factors, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(factors, 16));
    const __m256i byte_offset = _mm256_sub_epi16(_mm256_set1_epi16(64), _mm256_slli_epi16(factor, 3));
    const __m256i offset = _mm256_or_si256(byte_offset, _mm256_slli_epi16(byte_offset, 8));
    const auto scaled = [&](__m256i nibbles) {
        return _mm256_add_epi16(_mm256_mullo_epi16(nibbles, factor), offset);
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), scaled(low_nibbles(both)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), scaled(low_nibbles(_mm256_srli_epi16(both, 4))));
}
inline void unpack(const Bytes& both, const Lanes& factors, std::uint8_t* low, std::uint8_t* high) {
    unpack(both.a, factors.a, low, high);
    unpack(both.b, factors.b, low + 32, high + 32);
}
inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats to_floats(const Lanes& lanes) { return {_mm256_cvtepi32_ps(lanes.a), _mm256_cvtepi32_ps(lanes.b)}; }
inline Floats plus(const Floats& x, const Floats& y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats times(const Floats& x, float y) {
    return {_mm256_mul_ps(x.a, _mm256_set1_ps(y)), _mm256_mul_ps(x.b, _mm256_set1_ps(y))};
}
inline Floats times(const Floats& x, const float* y) {
    return {_mm256_mul_ps(x.a, _mm256_loadu_ps(y)), _mm256_mul_ps(x.b, _mm256_loadu_ps(y + 8))};
}
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widened(__m128i narrow) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
inline Floats load_narrow(const std::uint16_t* p) {
    const auto* halves = reinterpret_cast<const __m128i*>(p);
    return {widened(_mm_loadu_si128(halves)), widened(_mm_loadu_si128(halves + 1))};
}
inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}
inline void even_odd(const char* p, Floats& evens, Floats& odds) {
    const Bytes pairs = load(reinterpret_cast<const std::uint8_t*>(p));
    evens = {even(pairs.a), even(pairs.b)};
    odds = {odd(pairs.a), odd(pairs.b)};
}
inline Floats times_plus(const Floats& x, float y, const Floats& sum) {
    const __m256 all = _mm256_set1_ps(y);
    return {_mm256_fmadd_ps(x.a, all, sum.a), _mm256_fmadd_ps(x.b, all, sum.b)};
}
inline Floats add_product(const Floats& x, const Floats& y, const Floats& sum) {
    return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
inline void store(float* p, const Floats& floats) {
    _mm256_storeu_ps(p, floats.a);
    _mm256_storeu_ps(p + 8, floats.b);
}
