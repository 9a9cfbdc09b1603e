// What is done to rows of floats one element at a time, included once by each instruction set in a namespace of its own.
// The loops are plain C++: the compiler makes vectors of them, and no rounding depends on their width.
//
// Nothing here and in the files beside it may call an inline function with external linkage, such as the standard
// library's: the linker would keep one copy of it for all instruction sets, and not necessarily one that every processor
// can run.

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// How numbers become integers from -levels to levels, the largest magnitude the last one: x * inverse, and scale times
// that is x again. Numbers of which none is above kSmallest all become zero, those among which is NaN or an infinity get
// a scale of NaN. Magnitudes are compared as integers: their order is the same.
struct Step {
    float scale, inverse;
};
inline Step step_of(const float* x, std::int64_t count, float levels) {
    constexpr std::uint32_t infinity = 0x7f800000;
    std::uint32_t bits = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        std::uint32_t magnitude;
        __builtin_memcpy(&magnitude, x + i, sizeof magnitude);
        magnitude &= 0x7fffffff;
        bits = magnitude > bits ? magnitude : bits;
    }
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    if (bits >= infinity) return {__builtin_nanf(""), 0.0f};
    if (!(largest > kSmallest)) return {0.0f, 0.0f};
    return {largest / levels, levels / largest};
}

// Halves are rounded to even; where there is no number to be had, nothing.
inline std::int32_t rounded(float x, const Step& step) {
    const float scaled = x * step.inverse;
    return std::int32_t(__builtin_rintf(scaled == scaled ? scaled : 0.0f));
}

void quantise_row(const float* row, std::int64_t depth, std::int8_t* values, float* scales, std::int32_t* group_sums,
                  std::int32_t* span_sums) {
    for (std::int64_t span = 0; span < spans(depth); ++span) {
        const std::int64_t begin = span * kSpan, end = smaller(depth, begin + kSpan);
        const Step step = step_of(row + begin, end - begin, 127.0f);
        scales[span] = step.scale;
        std::int32_t span_sum = 0;
        for (std::int64_t group = begin; group < end; group += kGroup) {
            std::int32_t sum = 0;
            for (std::int64_t k = group; k < group + kGroup; ++k) {
                const std::int32_t value = rounded(row[k], step);
                values[k] = std::int8_t(value);
                sum += value;
            }
            group_sums[group / kGroup] = sum;
            span_sum += sum;
        }
        span_sums[span] = span_sum;
    }
}

float quantise_head(const float* x, std::int64_t count, std::int8_t* values) {
    const Step step = step_of(x, count, 127.0f);
    for (std::int64_t i = 0; i < count; ++i) values[i] = std::int8_t(rounded(x[i], step));
    return step.scale;
}

// To 15 bits, in two halves.
void quantise_finely(const float* x, std::int64_t count, const RowIntegers& into) {
    const Step step = step_of(x, count, float(kFineLevels));
    std::int8_t *__restrict highs = into.halves[0], *__restrict lows = into.halves[1];
    std::int32_t high_sum = 0, low_sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t value = rounded(x[i], step), high = (value + 128) >> 8;
        highs[i] = std::int8_t(high);
        lows[i] = std::int8_t(value - high * 256);
        high_sum += high;
        low_sum += value - high * 256;
    }
    *into.sums[0] = high_sum;
    *into.sums[1] = low_sum;
    *into.scales = step.scale;
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

inline float sum_of(const float* x, std::int64_t count) {
    float sums[kPanel] = {};
    std::int64_t i = 0;
    for (; i + kPanel <= count; i += kPanel)
        for (int lane = 0; lane < kPanel; ++lane) sums[lane] += x[i + lane];
    for (int lane = 0; i < count; ++i, ++lane) sums[lane] += x[i];
    return add_lanes(sums);
}

float exponentials(float* x, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) x[i] = exp_of_negative(x[i]) + 0.0f * x[i];  // NaN stays NaN
    return sum_of(x, count);
}

// The largest of at least one number; NaN counts for nothing unless it stands first.
inline float largest_of(const float* x, std::int64_t count) {
    float lanes[kPanel];
    for (int lane = 0; lane < kPanel; ++lane) lanes[lane] = x[0];
    std::int64_t i = 0;
    for (; i + kPanel <= count; i += kPanel)
        for (int lane = 0; lane < kPanel; ++lane) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    float largest = lanes[0];
    for (int lane = 1; lane < kPanel; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}

std::int64_t largest(const float* x, std::int64_t count, float* peak) {
    std::int32_t nans = 0;
    for (std::int64_t i = 0; i < count; ++i) nans += x[i] != x[i];
    *peak = nans > 0 ? __builtin_nanf("") : largest_of(x, count);
    std::int64_t place = 0;
    while (nans > 0 ? x[place] == x[place] : x[place] != *peak) ++place;
    return place;
}

float weights(float* logits, std::int64_t count, float peak, float temperature, float floor, float* weights) {
    const float none = -__builtin_inff();
    for (std::int64_t i = 0; i < count; ++i) {
        const float score = (logits[i] - peak) / temperature;
        logits[i] = score >= floor ? score : none;  // NaN is left out, so that scores can be sorted
        weights[i] = logits[i] > -87.0f ? exp_of_negative(logits[i]) : 0.0f;
    }
    return sum_of(weights, count);
}
