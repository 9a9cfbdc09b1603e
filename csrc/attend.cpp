// A machine's work on the KV cache: what is stored there, and how a step's queries share the threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"

namespace tern {

namespace {

constexpr std::int64_t kSplitRows = 4;      // up to here a sequence's queries share the threads split by split
constexpr std::int64_t kTokensABlock = 16;  // of a longer one

}  // namespace

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

}  // namespace tern
