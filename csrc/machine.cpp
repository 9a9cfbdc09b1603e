#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

namespace tern {

namespace {

constexpr std::int64_t kRowsAPiece = 8;       // of quantisation
constexpr std::int64_t kManyTokens = 64;
// Panels of a product that a thread takes at a time: long streams of weights for few rows, a piece that stays in the
// cache for many; for the last product of many tokens' experts, as many as keep their rows from being read too often.
constexpr std::int64_t kPanelsAPiece = 4, kPanelsAStream = 16;
constexpr std::int64_t kSplitRows = 4;        // up to here a sequence's queries share the threads split by split
constexpr std::int64_t kLittleWork = 200000;  // products that one thread has done before another one is awake
constexpr std::int64_t kTokensABlock = 16;    // of a longer one

std::int64_t pieces(std::int64_t total, std::int64_t size) { return (total + size - 1) / size; }

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

void Machine::rotate_and_store(const Rows& qkv, const float* cosines, const float* sines, const std::int64_t* slots,
                               const Cache& cache, const Rows& queries) {
    const std::int64_t width = cache.head_dim, heads = queries.width / width;
    pool_.run(pieces(qkv.count, kRowsAPiece), [&](int thread, std::int64_t piece) {
        Thread& memory = memory_[thread];
        float* buffer = memory.row.of(qkv.width);
        float* turned = memory.other_row.of(width);
        const std::int64_t last = std::min(qkv.count, (piece + 1) * kRowsAPiece);
        for (std::int64_t row = piece * kRowsAPiece; row < last; ++row) {
            const float* input = load(qkv, row, 0, qkv.width, buffer);
            const float *cos = cosines + row * width, *sin = sines + row * width;
            for (std::int64_t head = 0; head < heads; ++head) {
                kernels_.rotate(input + head * width, cos, sin, width, turned);
                store(turned, width, queries, row, head * width);
            }
            const std::int64_t block = slots[row] / cache.block_size, offset = slots[row] % cache.block_size;
            for (std::int64_t head = 0; head < cache.kv_heads; ++head) {
                const std::int64_t place = (head * cache.num_blocks + block) * cache.head_bytes();
                kernels_.rotate(input + (heads + head) * width, cos, sin, width, turned);
                round(turned, width, qkv.type, memory);
                store_key(turned, cache, cache.keys + place, offset, memory);
                store_value(input + (heads + cache.kv_heads + head) * width, cache, cache.values + place, offset, memory);
            }
        }
    });
}

// One token's key or value as the cache has it, the scale of int8 behind it.
const char* Machine::encode(const float* floats, const Cache& cache, Thread& memory) {
    if (cache.element_bytes == 4) return reinterpret_cast<const char*>(floats);
    char* narrow = reinterpret_cast<char*>(memory.narrow.of(cache.row_bytes()));
    if (cache.element_bytes == 2) {
        kernels_.narrow(floats, cache.head_dim, reinterpret_cast<std::uint16_t*>(narrow));
    } else {
        const float scale = kernels_.quantise_head(floats, cache.head_dim, reinterpret_cast<std::int8_t*>(narrow));
        std::memcpy(narrow + cache.head_dim, &scale, sizeof scale);
    }
    return narrow;
}

// `block`: one head's keys of a block, or its values.
void Machine::store_key(const float* key, const Cache& cache, char* block, std::int64_t offset, Thread& memory) {
    const char* bytes = encode(key, cache, memory);
    for (std::int64_t unit = 0; unit < cache.row_bytes() / kKeyUnitBytes; ++unit)
        std::memcpy(block + (unit * cache.block_size + offset) * kKeyUnitBytes, bytes + unit * kKeyUnitBytes, kKeyUnitBytes);
}

void Machine::store_value(const float* value, const Cache& cache, char* block, std::int64_t offset, Thread& memory) {
    const char* bytes = encode(value, cache, memory);
    if (cache.element_bytes > 1) {
        std::memcpy(block + offset * cache.row_bytes(), bytes, std::size_t(cache.row_bytes()));
        return;
    }
    const std::int64_t token = offset % kQuad;
    char* quads = block + (offset - token) * cache.row_bytes();
    for (std::int64_t d = 0; d < cache.head_dim; ++d) quads[d * kQuad + token] = bytes[d];
    std::memcpy(quads + (cache.head_dim + token) * kQuad, bytes + cache.head_dim, sizeof(float));
}

// Query rows of one head: `tokens` tokens of a sequence from `first` on, each with the query heads that share the head.
struct Machine::Queries {
    std::int64_t sequence, first, tokens, kv_head, group;
    std::int64_t rows() const { return tokens * group; }
};

namespace {

// What rows have seen so far: [rows, head_dim] mixed values, then [rows] highest scores, then [rows] totals.
std::int64_t state_size(std::int64_t rows, std::int64_t head_dim) { return rows * (head_dim + 2); }

}  // namespace

// The rows' queries, scaled, as the tiles of this cache take them.
void Machine::load_queries(const Queries& q, const Rows& queries, const Cache& cache, Thread& memory) {
    const std::int64_t width = cache.head_dim;
    const float scale = 1.0f / std::sqrt(float(width));
    float* all = memory.queries.of(q.rows() * width);
    const RowIntegers integers = memory.query_integers.of(q.rows(), width);
    for (std::int64_t row = 0; row < q.rows(); ++row, all += width) {
        const std::int64_t head = q.kv_head * q.group + row % q.group;
        const float* floats = load(queries, q.first + row / q.group, head * width, width, all);
        for (std::int64_t d = 0; d < width; ++d) all[d] = floats[d] * scale;
        if (cache.element_bytes == 1) kernels_.quantise_finely(all, width, integers.from(row, width));
    }
}

// The rows' attention over the positions of one split, tile after tile. Rows that see none of it keep a total of 0.
void Machine::see(const Queries& q, const Cache& cache, const Sequences& sequences, std::int64_t split, float* state,
                  Thread& memory) {
    const std::int64_t rows = q.rows(), width = cache.head_dim;
    float *mixed = state, *highest = mixed + rows * width, *total = highest + rows;
    std::fill(mixed, mixed + rows * width, 0.0f);
    std::fill(highest, highest + rows, -std::numeric_limits<float>::infinity());
    std::fill(total, total + rows, 0.0f);
    const std::int64_t end = sequences.query_starts[q.sequence + 1], context = sequences.context_lens[q.sequence];
    const std::int64_t position = context - (end - q.first);  // of the first token
    const std::int64_t* table = sequences.block_tables + q.sequence * sequences.max_blocks;
    float* scores = memory.scores.of(rows * kTile);
    float* tile_mixed = memory.mixed.of(state_size(rows, width));
    float *tile_highest = tile_mixed + rows * width, *tile_total = tile_highest + rows;
    char* together = reinterpret_cast<char*>(memory.scratch.of(2 * kPanel * cache.row_bytes()));
    std::int32_t* visible = memory.visible.of(rows);
    for (std::int64_t start = split * kSplit; start < (split + 1) * kSplit; start += kTile) {
        const std::int64_t skipped = std::max<std::int64_t>(0, start - position);  // tokens before the tile
        if (skipped >= q.tokens) break;
        const std::int64_t first_row = skipped * q.group, live = rows - first_row;
        const std::int64_t count = std::min<std::int64_t>(kTile, position + q.tokens - start);
        for (std::int64_t row = 0; row < live; ++row)
            visible[row] = std::int32_t(std::min<std::int64_t>(count, position + skipped + row / q.group + 1 - start));
        const std::int64_t first_block = start / cache.block_size, last_block = (start + count - 1) / cache.block_size;
        memory.keys.clear();
        memory.values.clear();
        for (std::int64_t block = first_block; block <= last_block; ++block) {
            const std::int64_t place = (q.kv_head * cache.num_blocks + table[block]) * cache.head_bytes();
            memory.keys.push_back(cache.keys + place);
            memory.values.push_back(cache.values + place);
        }
        const AttentionTile tile{memory.queries.of(rows * width) + first_row * width,
                                 memory.query_integers.of(rows, width).from(first_row, width),
                                 memory.weights.of(rows, kTile), memory.value_quads.of(kTile / kQuad), live, visible, count,
                                 memory.keys.data(), memory.values.data(), start - first_block * cache.block_size,
                                 cache.block_size, width, cache.element_bytes};
        kernels_.attend_tile(tile, scores, together, tile_highest, tile_total, tile_mixed);
        for (std::int64_t row = 0; row < live; ++row)
            kernels_.join(tile_mixed + row * width, tile_highest[row], tile_total[row], width,
                          mixed + (first_row + row) * width, highest[first_row + row], total[first_row + row]);
    }
}

void Machine::attend(const Rows& queries, const Cache& cache, const Sequences& sequences, const Rows& output) {
    const std::lock_guard turn(turn_);
    const std::int64_t width = cache.head_dim, group = queries.width / width / cache.kv_heads;
    struct Work {
        Queries queries;
        std::int64_t split;   // or all of them: -1
        std::int64_t splits;  // that the rows see
        std::int64_t state;   // where the split's state is kept
    };
    std::vector<Work> work, joined;
    std::int64_t state_floats = 0;
    for (std::int64_t s = 0; s < sequences.count; ++s) {
        const std::int64_t first = sequences.query_starts[s], end = sequences.query_starts[s + 1];
        const std::int64_t context = sequences.context_lens[s];
        for (std::int64_t head = 0; head < cache.kv_heads; ++head) {
            if (end - first > 0 && end - first <= kSplitRows) {
                const Queries q{s, first, end - first, head, group};
                const std::int64_t splits = pieces(context, kSplit);
                joined.push_back({q, -1, splits, state_floats});
                for (std::int64_t split = 0; split < splits; ++split, state_floats += state_size(q.rows(), width))
                    work.push_back({q, split, splits, state_floats});
                continue;
            }
            for (std::int64_t token = first; token < end; token += kTokensABlock) {
                const std::int64_t tokens = std::min(kTokensABlock, end - token);
                const std::int64_t seen = context - (end - token) + tokens;
                work.push_back({{s, token, tokens, head, group}, -1, pieces(seen, kSplit), 0});
            }
        }
    }
    float* states = states_.of(state_floats);

    const auto join_states = [&](const float* from, std::int64_t rows, float* into) {
        for (std::int64_t row = 0; row < rows; ++row)
            kernels_.join(from + row * width, from[rows * width + row], from[rows * (width + 1) + row], width,
                          into + row * width, into[rows * width + row], into[rows * (width + 1) + row]);
    };
    const auto finish = [&](const Queries& q, float* state) {
        const float* totals = state + q.rows() * (width + 1);
        for (std::int64_t row = 0; row < q.rows(); ++row) {
            float* mixed = state + row * width;
            for (std::int64_t d = 0; d < width; ++d) mixed[d] /= totals[row];
            store(mixed, width, output, q.first + row / group, (q.kv_head * group + row % group) * width);
        }
    };

    const auto attend_piece = [&](int thread, std::int64_t piece) {
        const Work& w = work[piece];
        Thread& memory = memory_[thread];
        load_queries(w.queries, queries, cache, memory);
        if (w.split >= 0) {
            see(w.queries, cache, sequences, w.split, states + w.state, memory);
            return;
        }
        const std::int64_t rows = w.queries.rows(), size = state_size(rows, width);
        float *all = memory.states.of(2 * size), *one = all + size;
        see(w.queries, cache, sequences, 0, all, memory);
        for (std::int64_t split = 1; split < w.splits; ++split) {
            see(w.queries, cache, sequences, split, one, memory);
            join_states(one, rows, all);
        }
        finish(w.queries, all);
    };
    const auto join_piece = [&](int, std::int64_t piece) {
        const Work& w = joined[piece];
        const std::int64_t size = state_size(w.queries.rows(), width);
        float* all = states + w.state;
        for (std::int64_t split = 1; split < w.splits; ++split) join_states(all + split * size, w.queries.rows(), all);
        finish(w.queries, all);
    };
    std::int64_t products = 0;
    for (const Work& w : work) products += w.queries.rows() * width * sequences.context_lens[w.queries.sequence];
    pool_.run(std::int64_t(work.size()), attend_piece, products > kLittleWork);
    pool_.run(std::int64_t(joined.size()), join_piece, state_floats > kLittleWork);
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
