#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>

namespace tern {

namespace {

constexpr std::int64_t kManyTokens = 64;
// Panels of a product that a thread takes at a time: long streams of weights for few rows, a piece that stays in the
// cache for many; for the last product of many tokens' experts, as many as keep their rows from being read too often.
constexpr std::int64_t kPanelsAPiece = 4, kPanelsAStream = 16;

}  // namespace

void ActivationBuffer::reserve(std::int64_t new_rows, std::int64_t new_depth) {
    rows = new_rows;
    depth = new_depth;
    values_ = values.of((rows + kRowsBeyond) * depth);
    scales_ = scales.of(rows * spans(depth));
    group_sums_ = group_sums.of(rows * (depth / kGroup));
    span_sums_ = span_sums.of(rows * spans(depth));
}

Activations ActivationBuffer::part(std::int64_t first, std::int64_t count) const {
    return {values_ + first * depth,
            scales_ + first * spans(depth),
            group_sums_ + first * (depth / kGroup),
            span_sums_ + first * spans(depth),
            count,
            depth};
}

void ActivationBuffer::copy_row(std::int64_t row, const ActivationBuffer& from, std::int64_t source) {
    const auto copy = [&](auto* to, const auto* all, std::int64_t width) {
        std::memcpy(to + row * width, all + source * width, std::size_t(width) * sizeof *to);
    };
    copy(values_, from.values_, depth);
    copy(scales_, from.scales_, spans(depth));
    copy(group_sums_, from.group_sums_, depth / kGroup);
    copy(span_sums_, from.span_sums_, spans(depth));
}

RowIntegers IntegerBuffer::of(std::int64_t rows, std::int64_t width) {
    std::int8_t* both_halves = halves.of(2 * rows * width);
    std::int32_t* both_sums = sums.of(2 * rows);
    return {{both_halves, both_halves + rows * width}, {both_sums, both_sums + rows}, scales.of(rows)};
}

// Some rows of a step through one SwiGLU: row r is token tokens[r] (or r itself) and counts weights[r] (or 1).
struct Machine::Task {
    SwiGLU layer;
    Activations input;
    float* gated;             // [rows, padded half]
    ActivationBuffer* inner;  // rows from first_row on: `gated`, quantised
    std::int64_t first_row;
    const std::int32_t* tokens;
    const float* weights;
};

Machine::Machine(const Kernels& kernels, int threads)
    : kernels_(kernels), pool_(threads), memory_(std::size_t(threads)) {}

void Machine::quantise(const float* row, ActivationBuffer& into, std::int64_t at) {
    const std::int64_t depth = into.depth, groups = depth / kGroup;
    kernels_.quantise_row(row, depth, into.values_ + at * depth, into.scales_ + at * spans(depth),
                          into.group_sums_ + at * groups, into.span_sums_ + at * spans(depth));
}

// One row of `x` at a time: as floats, then zeros up to `depth`.
void Machine::quantise_rows(const Rows& x, ActivationBuffer& into, std::int64_t depth) {
    into.reserve(x.count, depth);
    pool_.run(pieces(x.count, kRowsAPiece), [&](int thread, std::int64_t piece) {
        float* buffer = memory_[thread].row.of(depth);
        std::fill(buffer + x.width, buffer + depth, 0.0f);
        const std::int64_t last = std::min(x.count, (piece + 1) * kRowsAPiece);
        for (std::int64_t row = piece * kRowsAPiece; row < last; ++row) {
            const float* floats = load(x, row, 0, x.width, buffer);
            if (floats != buffer && x.width < depth) {
                std::copy(floats, floats + x.width, buffer);
                floats = buffer;
            }
            quantise(floats, into, row);
        }
    });
}

// `count` floats of a row, from `column` on: where they stand, or in the buffer.
const float* Machine::load(const Rows& x, std::int64_t row, std::int64_t column, std::int64_t count, float* buffer) {
    const std::int64_t place = row * x.width + column;
    if (x.type == FloatType::f32) return static_cast<const float*>(x.data) + place;
    kernels_.widen(static_cast<const std::uint16_t*>(x.data) + place, count, buffer);
    return buffer;
}

void Machine::round(float* row, std::int64_t count, FloatType type, Thread& memory) {
    if (type == FloatType::f32) return;
    std::uint16_t* narrow = memory.narrow.of(count);
    kernels_.narrow(row, count, narrow);
    kernels_.widen(narrow, count, row);
}

// `count` floats into row `at` of the output, from `column` on.
void Machine::store(const float* row, std::int64_t count, const Rows& output, std::int64_t at, std::int64_t column) {
    const std::int64_t place = at * output.width + column;
    if (output.type == FloatType::bf16)
        kernels_.narrow(row, count, static_cast<std::uint16_t*>(output.data) + place);
    else
        std::copy(row, row + count, static_cast<float*>(output.data) + place);
}

void Machine::linear(const Rows& x, const Linear& layer, const Rows& output) {
    if (x.count == 0) return;
    const std::lock_guard turn(turn_);
    const PackedWeight& w = layer.weight;
    quantise_rows(x, tokens_, w.depth);
    const Activations input = tokens_.part(0, x.count);
    const std::int64_t size = x.count < kManyTokens ? kPanelsAStream : kPanelsAPiece;
    pool_.run(pieces(w.panels(), size), [&](int thread, std::int64_t piece) {
        const std::int64_t first = piece * size, last = std::min(w.panels(), first + size);
        const std::int64_t width = (last - first) * kPanel, begin = first * kPanel;
        const std::int64_t wanted = std::min(layer.out, begin + width) - begin;
        float* product = memory_[thread].product.of(x.count * width);
        kernels_.multiply(input, w, first, last, product, width, memory_[thread].scratch.of(scratch_bytes(w.depth)));
        for (std::int64_t row = 0; row < x.count && wanted > 0; ++row, product += width) {
            if (layer.bias) kernels_.add_scaled(layer.bias + begin, 1.0f, wanted, product);
            store(product, wanted, output, row, begin);
        }
    }, x.count * w.columns * w.depth > kLittleWork);
}

void Machine::swiglu(const Rows& x, const SwiGLU& layer, const Rows& output) {
    if (x.count == 0) return;
    const std::lock_guard turn(turn_);
    quantise_rows(x, tokens_, layer.gate_up.weight.depth);
    inner_.reserve(x.count, layer.down.weight.depth);
    float* gated = gated_.of(x.count * inner_.depth);
    run_layer({{layer, tokens_.part(0, x.count), gated, &inner_, 0, nullptr, nullptr}}, output);
}

void Machine::mix_experts(const Rows& x, const float* weights, const std::int64_t* chosen, std::int64_t per_token,
                          const Experts& experts, const Rows& output) {
    if (x.count == 0) return;
    const std::lock_guard turn(turn_);
    const std::int64_t num_pairs = x.count * per_token, depth = experts.first.gate_up.weight.depth;
    std::int32_t* tokens = pair_tokens_.of(num_pairs);
    float* pair_weights = pair_weights_.of(num_pairs);
    std::int64_t* starts = starts_.of(experts.count + 1);
    // Sorted by expert; tokens in order within each.
    std::fill(starts, starts + experts.count + 1, 0);
    for (std::int64_t i = 0; i < num_pairs; ++i) ++starts[chosen[i] + 1];
    for (std::int64_t e = 0; e < experts.count; ++e) starts[e + 1] += starts[e];
    std::int64_t* places = places_.of(num_pairs);
    std::int64_t* next = next_.of(experts.count);
    std::copy(starts, starts + experts.count, next);
    for (std::int64_t i = 0; i < num_pairs; ++i) {
        places[i] = next[chosen[i]]++;
        tokens[places[i]] = std::int32_t(i / per_token);
        pair_weights[places[i]] = weights[i];
    }

    quantise_rows(x, tokens_, depth);
    pairs_.reserve(num_pairs, depth);
    pool_.run(pieces(x.count, kRowsAPiece), [&](int, std::int64_t piece) {
        const std::int64_t last = std::min(x.count, (piece + 1) * kRowsAPiece) * per_token;
        for (std::int64_t i = piece * kRowsAPiece * per_token; i < last; ++i)
            pairs_.copy_row(places[i], tokens_, i / per_token);
    });

    inner_.reserve(num_pairs, experts.first.down.weight.depth);
    float* gated = gated_.of(num_pairs * inner_.depth);
    std::vector<Task> tasks;
    for (std::int64_t e = 0; e < experts.count; ++e) {
        const std::int64_t first = starts[e], count = starts[e + 1] - first;
        if (count == 0) continue;
        const SwiGLU& all = experts.first;
        const SwiGLU layer{{all.gate_up.weight.at(e), nullptr, all.gate_up.out}, {all.down.weight.at(e), nullptr, all.down.out}};
        tasks.push_back({layer, pairs_.part(first, count), gated + first * inner_.depth, &inner_, first, tokens + first,
                         pair_weights + first});
    }
    if (experts.has_shared) {
        shared_inner_.reserve(x.count, experts.shared.down.weight.depth);
        float* shared_gated = shared_gated_.of(x.count * shared_inner_.depth);
        tasks.push_back({experts.shared, tokens_.part(0, x.count), shared_gated, &shared_inner_, 0, nullptr, nullptr});
    }
    run_layer(tasks, output);
}

// The tasks' sum for every token, in the tasks' order.
void Machine::run_layer(const std::vector<Task>& tasks, const Rows& output) {
    struct Piece {
        const Task* task;
        std::int64_t first, last;
    };
    std::vector<Piece> work;
    std::int64_t products = 0;
    for (const Task& task : tasks) {
        const PackedWeight &first = task.layer.gate_up.weight, &last = task.layer.down.weight;
        products += task.input.rows * (first.columns * first.depth + last.columns * last.depth);
    }
    const bool shared = products > kLittleWork;
    const std::int64_t size = output.count < kManyTokens ? kPanelsAStream : kPanelsAPiece;
    for (const Task& task : tasks)
        for (std::int64_t first = 0, half = task.layer.half() / kPanel; first < half; first += size)
            work.push_back({&task, first, std::min(half, first + size)});
    pool_.run(std::int64_t(work.size()), [&](int thread, std::int64_t piece) {
        const auto [task, first, last] = work[piece];
        const Linear& layer = task->layer.gate_up;
        const std::int64_t half = task->layer.half(), width = (last - first) * kPanel, begin = first * kPanel;
        const std::int64_t rows = task->input.rows, stride = task->inner->depth;
        float* gate = memory_[thread].product.of(2 * rows * width);
        float* up = gate + rows * width;
        std::uint8_t* scratch = memory_[thread].scratch.of(scratch_bytes(layer.weight.depth));
        kernels_.multiply(task->input, layer.weight, first, last, gate, width, scratch);
        kernels_.multiply(task->input, layer.weight, half / kPanel + first, half / kPanel + last, up, width, scratch);
        for (std::int64_t row = 0; row < rows; ++row, gate += width, up += width) {
            if (layer.bias) {
                kernels_.add_scaled(layer.bias + begin, 1.0f, width, gate);
                kernels_.add_scaled(layer.bias + half + begin, 1.0f, width, up);
            }
            float* gated = task->gated + row * stride;
            kernels_.silu_mul(gate, up, width, gated + begin);
            if (begin + width == half) std::fill(gated + half, gated + stride, 0.0f);
        }
    }, shared);

    work.clear();
    for (const Task& task : tasks)
        for (std::int64_t first = 0; first < task.input.rows; first += kRowsAPiece)
            work.push_back({&task, first, std::min(task.input.rows, first + kRowsAPiece)});
    pool_.run(std::int64_t(work.size()), [&](int, std::int64_t piece) {
        const auto [task, first, last] = work[piece];
        for (std::int64_t row = first; row < last; ++row)
            quantise(task->gated + row * task->inner->depth, *task->inner, task->first_row + row);
    }, shared);

    const std::int64_t panels = tasks.front().layer.down.weight.panels(), wanted = tasks.front().layer.down.out;
    pool_.run(pieces(panels, kPanelsAStream), [&](int thread, std::int64_t piece) {
        const std::int64_t first = piece * kPanelsAStream, last = std::min(panels, first + kPanelsAStream);
        const std::int64_t width = (last - first) * kPanel, begin = first * kPanel;
        Thread& memory = memory_[thread];
        float* mixed = memory.mixed.of(output.count * width);
        std::fill(mixed, mixed + output.count * width, 0.0f);
        for (const Task& task : tasks) {
            const Linear& layer = task.layer.down;
            const std::int64_t rows = task.input.rows;
            float* product = memory.product.of(rows * width);
            kernels_.multiply(task.inner->part(task.first_row, rows), layer.weight, first, last, product, width,
                              memory.scratch.of(scratch_bytes(layer.weight.depth)));
            for (std::int64_t row = 0; row < rows; ++row, product += width) {
                if (layer.bias) kernels_.add_scaled(layer.bias + begin, 1.0f, std::min(width, layer.out - begin), product);
                const std::int64_t token = task.tokens ? task.tokens[row] : row;
                kernels_.add_scaled(product, task.weights ? task.weights[row] : 1.0f, width, mixed + token * width);
            }
        }
        const std::int64_t count = std::min(width, wanted - begin);
        for (std::int64_t token = 0; token < output.count && count > 0; ++token)
            store(mixed + token * width, count, output, token, begin);
    }, shared);
}

void Machine::silu_mul(const Rows& gate_up, const Rows& output) {
    const std::int64_t width = output.width;
    pool_.run(pieces(gate_up.count, kRowsAPiece), [&](int thread, std::int64_t piece) {
        Thread& memory = memory_[thread];
        float* gated = memory.product.of(2 * width);
        float* ones = gated + width;
        const std::int64_t last = std::min(gate_up.count, (piece + 1) * kRowsAPiece);
        for (std::int64_t row = piece * kRowsAPiece; row < last; ++row) {
            std::fill(ones, ones + width, 1.0f);
            kernels_.silu_mul(load(gate_up, row, 0, width, memory.row.of(width)), ones, width, gated);
            round(gated, width, gate_up.type, memory);
            const float* up = load(gate_up, row, width, width, memory.other_row.of(width));
            for (std::int64_t i = 0; i < width; ++i) gated[i] *= up[i];
            store(gated, width, output, row, 0);
        }
    }, gate_up.count * width > kLittleWork / 8);
}

void Machine::add_rms_norm(const Rows* delta, const Rows& residual, const Rows& weight, float eps, const Rows& normed,
                           const Rows& new_residual) {
    const std::int64_t width = residual.width;
    pool_.run(pieces(residual.count, kRowsAPiece), [&](int thread, std::int64_t piece) {
        Thread& memory = memory_[thread];
        float* sum = memory.row.of(width);
        float* other = memory.other_row.of(2 * width);
        const float* scales = load(weight, 0, 0, width, other + width);
        const std::int64_t last = std::min(residual.count, (piece + 1) * kRowsAPiece);
        for (std::int64_t row = piece * kRowsAPiece; row < last; ++row) {
            const float* stream = load(residual, row, 0, width, sum);
            if (stream != sum) std::copy(stream, stream + width, sum);
            if (delta) {
                kernels_.add_scaled(load(*delta, row, 0, width, other), 1.0f, width, sum);
                round(sum, width, residual.type, memory);
            }
            store(sum, width, new_residual, row, 0);
            const float scale = kernels_.inverse_norm(sum, width, eps);
            for (std::int64_t i = 0; i < width; ++i) sum[i] *= scale;
            round(sum, width, residual.type, memory);
            for (std::int64_t i = 0; i < width; ++i) sum[i] *= scales[i];
            store(sum, width, normed, row, 0);
        }
    });
}

void Machine::route(const Rows& x, const float* router, const float* bias, std::int64_t experts, std::int64_t per_token,
                    float norm_min, float* weights, std::int64_t* chosen) {
    pool_.run(pieces(x.count, kRowsAPiece), [&](int thread, std::int64_t piece) {
        Thread& memory = memory_[thread];
        float* buffer = memory.row.of(x.width);
        float* scores = memory.other_row.of(2 * experts);
        float* biased = scores + experts;
        const std::int64_t last = std::min(x.count, (piece + 1) * kRowsAPiece);
        for (std::int64_t row = piece * kRowsAPiece; row < last; ++row) {
            const float* input = load(x, row, 0, x.width, buffer);
            for (std::int64_t e = 0; e < experts; ++e) scores[e] = kernels_.dot(input, router + e * x.width, x.width);
            const float largest = *std::max_element(scores, scores + experts);
            for (std::int64_t e = 0; e < experts; ++e) scores[e] -= largest;
            const float all = kernels_.exponentials(scores, experts);
            for (std::int64_t e = 0; e < experts; ++e) {
                scores[e] /= all;
                biased[e] = scores[e] + bias[e];
            }
            float sum = 0.0f;
            for (std::int64_t k = 0; k < per_token; ++k) {
                std::int64_t best = -1;  // the first of equals; where all are NaN, the first that is left
                for (std::int64_t e = 0; e < experts; ++e) {
                    const bool taken = std::find(chosen + row * per_token, chosen + row * per_token + k, e) !=
                                       chosen + row * per_token + k;
                    if (!taken && (best < 0 || biased[e] > biased[best])) best = e;
                }
                chosen[row * per_token + k] = best;
                weights[row * per_token + k] = scores[best];
                sum += scores[best];
            }
            const float divisor = sum < norm_min ? norm_min : sum;
            for (std::int64_t k = 0; k < per_token; ++k) weights[row * per_token + k] /= divisor;
        }
    });
}

void Machine::pack(const Rows& weight, int bits, std::int64_t parts, std::uint8_t* values, std::uint8_t* factors,
                   float* scales) {
    const std::int64_t depth = pieces(weight.width, kGroup) * kGroup, rows = weight.count / parts;
    const std::int64_t panels = pieces(rows, kPanel);  // of a part
    const PackedWeight panel{bits, values, factors, scales, kPanel, depth};
    pool_.run(parts * panels, [&](int thread, std::int64_t piece) {
        const std::int64_t part = piece / panels, first = piece % panels * kPanel;
        float* columns = memory_[thread].row.of(kPanel * depth);
        std::fill(columns, columns + kPanel * depth, 0.0f);
        for (std::int64_t column = 0; column < std::min<std::int64_t>(kPanel, rows - first); ++column) {
            float* into = columns + column * depth;
            const float* row = load(weight, part * rows + first + column, 0, weight.width, into);
            if (row != into) std::copy(row, row + weight.width, into);
        }
        kernels_.pack_panel(columns, depth, depth, bits, values + piece * panel.value_bytes(),
                            factors + piece * panel.factor_bytes(), scales + piece * kPanel);
    });
}

namespace {

template <class Work>
double seconds(const Work& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double Machine::read_rate(const std::uint8_t* bytes, std::int64_t count) {
    constexpr std::int64_t piece_bytes = 1 << 20;
    const std::int64_t whole = count / piece_bytes;
    std::atomic<std::uint32_t> sink{0};
    return double(whole * piece_bytes) / seconds([&] {
        pool_.run(whole, [&](int, std::int64_t piece) { sink += kernels_.read(bytes + piece * piece_bytes, piece_bytes); });
    });
}

double Machine::peak_rate() {
    constexpr std::int64_t rounds = 1 << 20, pieces_a_thread = 8;
    std::atomic<std::int32_t> sink{0};
    const std::int64_t total = pieces_a_thread * threads();
    return double(total) * double(rounds) * kPeakOps / seconds([&] {
        pool_.run(total, [&](int, std::int64_t) { sink += kernels_.peak(rounds); });
    });
}

}  // namespace tern
