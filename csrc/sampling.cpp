// The choice of a token from each row of logits: the largest, or a draw. Rows share the threads; a row is one thread's.
#include <algorithm>
#include <cmath>
#include <vector>

#include "machine.h"

namespace tern {

namespace {

constexpr std::int64_t kBlock = 256;   // weights that are added up in float32; their sums are added up in double
constexpr int kBinsAUnit = 32, kBins = 32 * kBinsAUnit;  // scores from 0 down to -32, by which the likeliest are found

struct Candidate {
    float score;
    std::int64_t id;
    bool operator<(const Candidate& other) const { return score != other.score ? score > other.score : id < other.id; }
};

// The place of the first running sum above the target; where rounding leaves none, that of the last positive weight.
template <class Weight>
std::int64_t first_above(std::int64_t count, double target, double sum, const Weight& weight) {
    std::int64_t last = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const double w = weight(i);
        if (w > 0.0) last = i;
        sum += w;
        if (w > 0.0 && sum > target) return i;
    }
    return last;
}

// The ids whose scores can be among the first `top_k`, or where those are all, among the first whose weights make up
// `mass`: a few more than those, sorted.
std::vector<Candidate> find_candidates(const float* scores, const float* weights, std::int64_t count, std::int64_t top_k,
                                       double mass) {
    const auto bin_of = [](float score) { return int(std::min(-score * kBinsAUnit, float(kBins))); };
    std::vector<double> masses(kBins + 1);
    std::vector<std::int64_t> numbers(kBins + 1);
    for (std::int64_t i = 0; i < count; ++i) {
        const int bin = bin_of(scores[i]);
        masses[bin] += weights[i];
        numbers[bin] += 1;
    }
    int last = 0;
    double reached = masses[0];
    std::int64_t number = numbers[0];
    for (; last < kBins && (top_k < count ? number < top_k : reached < mass); ++last) {
        reached += masses[last + 1];
        number += numbers[last + 1];
    }
    last = std::min(last + 1, kBins);  // sums of one order and another may differ in their last bits
    std::vector<Candidate> found;
    for (std::int64_t i = 0; i < count; ++i)
        if (bin_of(scores[i]) <= last) found.push_back({scores[i], i});
    std::sort(found.begin(), found.end());
    return found;
}

// As tern.ops.reference_sampling draws from sorted scores.
std::int64_t draw_sorted(const std::vector<Candidate>& sorted, const Draw& draw, double total, std::int64_t count) {
    const std::int64_t most = std::min<std::int64_t>(draw.top_k, std::int64_t(sorted.size()));
    std::vector<double> weights(std::size_t(std::max<std::int64_t>(most, 1)));
    double sum = 0.0;
    for (std::int64_t i = 0; i < most; ++i) sum += weights[i] = std::exp(double(sorted[i].score));
    const double mass = draw.top_p * (draw.top_k < count ? sum : total);
    double kept_sum = 0.0;
    std::int64_t kept = 0;
    for (; kept < most && (kept == 0 || (weights[kept] > 0.0 && kept_sum < mass)); ++kept) kept_sum += weights[kept];
    return sorted[first_above(kept, draw.uniform * kept_sum, 0.0, [&](std::int64_t i) { return weights[i]; })].id;
}

}  // namespace

void Machine::largest(const float* logits, std::int64_t rows, std::int64_t width, float* peaks, std::int64_t* ids) {
    pool_.run(rows, [&](int, std::int64_t row) { ids[row] = kernels_.largest(logits + row * width, width, peaks + row); });
}

void Machine::draw(float* logits, std::int64_t rows, std::int64_t width, const float* peaks, const Draw* draws,
                   std::int64_t* ids) {
    pool_.run(rows, [&](int thread, std::int64_t row) {
        float* scores = logits + row * width;
        float* weights = memory_[thread].row.of(width);
        const Draw& draw = draws[row];
        std::vector<double> sums;
        double total = 0.0;
        for (std::int64_t start = 0; start < width; start += kBlock) {
            const std::int64_t size = std::min(kBlock, width - start);
            sums.push_back(kernels_.weights(scores + start, size, peaks[row], draw.temperature, draw.floor, weights + start));
            total += sums.back();
        }
        if (draw.top_k < width || draw.top_p < 1.0) {
            ids[row] = draw_sorted(find_candidates(scores, weights, width, draw.top_k, draw.top_p * total), draw, total, width);
            return;
        }
        const double target = draw.uniform * total;
        const std::int64_t block = first_above(std::int64_t(sums.size()), target, 0.0, [&](std::int64_t i) { return sums[i]; });
        double before = 0.0;
        for (std::int64_t i = 0; i < block; ++i) before += sums[i];
        const std::int64_t start = block * kBlock;
        ids[row] = start + first_above(std::min(kBlock, width - start), target, before,
                                       [&](std::int64_t i) { return double(weights[start + i]); });
    });
}

}  // namespace tern
