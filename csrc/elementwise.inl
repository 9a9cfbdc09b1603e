// What is done to rows of floats one element at a time, included once by each instruction set in a namespace of its own.
// The loops are plain C++: the compiler makes vectors of them, and no rounding depends on their width.
//
// Nothing here and in the files beside it may call an inline function with external linkage, such as the standard
// library's: the linker would keep one copy of it for all instruction sets, and not necessarily one that every processor
// can run.

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The largest magnitude of a span becomes 127, halves are rounded to even. A span of nothing above kSmallest becomes
// zeros, one that holds NaN or an infinity becomes NaN. Magnitudes are compared as integers: their order is the same.
void quantise_row(const float* row, std::int64_t depth, std::int8_t* values, float* scales, std::int32_t* group_sums,
                  std::int32_t* span_sums) {
    constexpr std::uint32_t infinity = 0x7f800000;
    for (std::int64_t span = 0; span < spans(depth); ++span) {
        const std::int64_t begin = span * kSpan, end = smaller(depth, begin + kSpan);
        std::uint32_t bits = 0;
        for (std::int64_t k = begin; k < end; ++k) {
            std::uint32_t magnitude;
            __builtin_memcpy(&magnitude, row + k, sizeof magnitude);
            magnitude &= 0x7fffffff;
            bits = magnitude > bits ? magnitude : bits;
        }
        float largest;
        __builtin_memcpy(&largest, &bits, sizeof largest);
        const bool finite = bits < infinity;
        const float inverse = finite && largest > kSmallest ? 127.0f / largest : 0.0f;
        scales[span] = !finite ? __builtin_nanf("") : largest > kSmallest ? largest / 127.0f : 0.0f;
        std::int32_t span_sum = 0;
        for (std::int64_t group = begin; group < end; group += kGroup) {
            std::int32_t sum = 0;
            for (std::int64_t k = group; k < group + kGroup; ++k) {
                const std::int32_t value = finite ? std::int32_t(__builtin_rintf(row[k] * inverse)) : 0;
                values[k] = std::int8_t(value);
                sum += value;
            }
            group_sums[group / kGroup] = sum;
            span_sum += sum;
        }
        span_sums[span] = span_sum;
    }
}

// e^x for x <= 0 by Cody and Waite's reduction and a polynomial of degree 6: relative error below 3e-7. Every operation
// is rounded to float32, so that anyone who does the same steps gets the same bits. NaN counts as 0.
inline float exp_of_negative(float x) {
    x = x < 0.0f ? x : 0.0f;
    x = x > -87.0f ? x : -87.0f;
    const float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.388888889e-3f;
    p = p * r + 8.333333333e-3f;
    p = p * r + 4.166666667e-2f;
    p = p * r + 1.666666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const std::int32_t bits = (std::int32_t(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return p * power;
}

void silu_mul(const float* gate, const float* up, std::int64_t count, float* output) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float g = gate[i];
        const float e = exp_of_negative(g < 0.0f ? g : -g);
        output[i] = (g < 0.0f ? g * e : g) / (1.0f + e) * up[i];
    }
}

void add_scaled(const float* row, float weight, std::int64_t count, float* sum) {
    for (std::int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
}

void widen(const std::uint16_t* narrow, std::int64_t count, float* wide) {
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t bits = std::uint32_t(narrow[i]) << 16;
        __builtin_memcpy(wide + i, &bits, sizeof bits);
    }
}

void narrow(const float* wide, std::int64_t count, std::uint16_t* narrow) {
    for (std::int64_t i = 0; i < count; ++i) {
        std::uint32_t bits;
        __builtin_memcpy(&bits, wide + i, sizeof bits);
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        narrow[i] = std::uint16_t(nan ? 0x7fc0 : rounded);
    }
}

// Lanes are added pairwise at the end, so that the order is the same for every width of vectors.
inline float add_lanes(float* sums) {
    for (int width = kPanel / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    return sums[0];
}

float inverse_norm(const float* x, std::int64_t count, float eps) {
    float sums[kPanel] = {};
    std::int64_t i = 0;
    for (; i + kPanel <= count; i += kPanel)
        for (int lane = 0; lane < kPanel; ++lane) sums[lane] += x[i + lane] * x[i + lane];
    for (int lane = 0; i < count; ++i, ++lane) sums[lane] += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(add_lanes(sums) / float(count) + eps);
}

void rotate(const float* x, const float* cosines, const float* sines, std::int64_t count, float* output) {
    for (std::int64_t i = 0; i < count; i += 2) {
        output[i] = x[i] * cosines[i] + x[i + 1] * sines[i];
        output[i + 1] = x[i + 1] * cosines[i + 1] + x[i] * sines[i + 1];
    }
}

float exponentials(float* x, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) x[i] = exp_of_negative(x[i]) + 0.0f * x[i];  // NaN stays NaN
    float sums[kPanel] = {};
    std::int64_t i = 0;
    for (; i + kPanel <= count; i += kPanel)
        for (int lane = 0; lane < kPanel; ++lane) sums[lane] += x[i + lane];
    for (int lane = 0; i < count; ++i, ++lane) sums[lane] += x[i];
    return add_lanes(sums);
}
