// Rounding weights to the layout of packed.h, included once by each instruction set in a namespace of its own.

constexpr int kShrinks = 9;  // shares of the full range that are tried as a column's scale: 1, 0.95 .. 0.6

inline std::int32_t clamped(float x, std::int32_t low, std::int32_t high) {
    const std::int32_t rounded = std::int32_t(__builtin_rintf(x));
    return rounded < low ? low : rounded > high ? high : rounded;
}

// The squared error of a group whose weights are multiples of `step`.
inline float group_error(const float* group, float step) {
    const float inverse = step == 0.0f ? 1.0f : 1.0f / step;
    float sums[kPanel] = {};
    for (int half = 0; half < kGroup; half += kPanel)
        for (int lane = 0; lane < kPanel; ++lane) {
            const float w = group[half + lane];
            const float error = float(clamped(w * inverse, -8, 7)) * step - w;
            sums[lane] += error * error;
        }
    return add_lanes(sums);
}

// The factor of least squared error among those that bring the largest magnitude nearest to q = -8 and nearest to 7.
inline std::int32_t best_factor(const float* group, float scale, float& error) {
    float extreme = 0.0f;
    for (int k = 0; k < kGroup; ++k)
        if (__builtin_fabsf(group[k]) > __builtin_fabsf(extreme)) extreme = group[k];
    const float exact = scale == 0.0f ? 0.0f : extreme / scale;
    std::int32_t best = 1;
    error = __builtin_inff();
    const float targets[] = {-8.0f, 7.0f};
    for (const float target : targets) {
        const float nearest = exact / target, size = __builtin_fabsf(nearest);
        std::int32_t last = 0;
        const float sizes[] = {__builtin_floorf(size), __builtin_ceilf(size)};
        for (const float wanted : sizes) {
            const std::int32_t factor = (nearest < 0.0f ? -1 : 1) * clamped(wanted, 1, 8);
            if (factor == last) continue;
            last = factor;
            const float tried = group_error(group, scale * float(factor));
            if (tried < error) error = tried, best = factor;
        }
    }
    return best;
}

// Columns [depth] of one panel, `stride` floats apart -> its values, factors (4 bits) and scales.
void pack_panel(const float* columns, std::int64_t stride, std::int64_t depth, int bits, std::uint8_t* values,
                std::uint8_t* factors, float* scales) {
    const std::int64_t groups = depth / kGroup;
    __builtin_memset(values, 0, std::size_t(kPanel * depth * bits / 8));
    if (bits == 4) __builtin_memset(factors, 0, std::size_t(groups * kFactorBytes));
    for (int column = 0; column < kPanel; ++column, columns += stride) {
        float largest = 0.0f;
        for (std::int64_t k = 0; k < depth; ++k) {
            const float size = __builtin_fabsf(columns[k]);
            largest = size > largest ? size : largest;
        }
        if (bits == 8) {
            scales[column] = largest / 127.0f;
            const float inverse = largest == 0.0f ? 1.0f : 1.0f / scales[column];
            for (std::int64_t k = 0; k < depth; ++k)
                values[(k / kQuad * kPanel + column) * kQuad + k % kQuad] =
                    std::uint8_t(clamped(columns[k] * inverse, -127, 127) + 128);
            continue;
        }
        float best_error = __builtin_inff(), scale = 0.0f;
        for (int shrink = 0; shrink < kShrinks; ++shrink) {
            const float tried = largest * ((1.0f - 0.05f * float(shrink)) / 64.0f);
            float total = 0.0f;
            for (std::int64_t group = 0; group < groups && total < best_error; ++group) {
                float error;
                best_factor(columns + group * kGroup, tried, error);
                total += error;
            }
            if (total < best_error) best_error = total, scale = tried;
        }
        scales[column] = scale;
        for (std::int64_t group = 0; group < groups; ++group) {
            float error;
            const std::int32_t factor = best_factor(columns + group * kGroup, scale, error);
            const std::int32_t code = factor < 0 ? factor + 8 : factor + 7;
            factors[group * kFactorBytes + column % kFactorBytes] |= std::uint8_t(code << (column < kFactorBytes ? 0 : 4));
            const float step = scale * float(factor), inverse = step == 0.0f ? 1.0f : 1.0f / step;
            for (int k = 0; k < kGroup; ++k) {
                const std::int32_t q = clamped(columns[group * kGroup + k] * inverse, -8, 7) + 8;
                const std::int64_t pair = k / (2 * kQuad);
                values[group * kGroupBytes + (pair * kPanel + column) * kQuad + k % kQuad] |=
                    std::uint8_t(q << (k / kQuad % 2 ? 4 : 0));
            }
        }
    }
}
