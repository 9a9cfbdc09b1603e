// Kernels of one instruction set, the threads that run them, and the layers' parts put together from them.
// Knows rows of floats and packed weights; knows no Python.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace tern {

constexpr std::int64_t kRowsAPiece = 8;       // of what is done row by row
constexpr std::int64_t kLittleWork = 200000;  // products that one thread has done before another one is awake

static inline std::int64_t pieces(std::int64_t total, std::int64_t size) { return (total + size - 1) / size; }

enum class FloatType { f32, bf16 };

// Rows of floats that lie one behind the other, `width` in each.
struct Rows {
    void* data;
    FloatType type;
    std::int64_t count;
    std::int64_t width;
};

// A linear layer: output columns beyond `out` are padding. `bias` [out] may be null.
struct Linear {
    PackedWeight weight;
    const float* bias;
    std::int64_t out;
};

// down(silu(gate(x)) * up(x)). The columns of gate_up are [gate | up], each half a multiple of kPanel wide; depths of
// `down` beyond a half are padding.
struct SwiGLU {
    Linear gate_up;
    Linear down;
    std::int64_t half() const { return gate_up.weight.columns / 2; }
};

// The routed experts of a layer, as a stack, and the shared one if `has_shared`.
struct Experts {
    SwiGLU first;
    std::int64_t count;
    bool has_shared;
    SwiGLU shared;
};

// How a row of logits is drawn from: see tern.ops.reference_sampling. Scores below `floor` are left out.
struct Draw {
    double uniform, top_p;
    std::int64_t top_k;
    float temperature, floor;
};

// Memory that grows to the largest size asked for and keeps it; aligned to 64 bytes.
template <class T>
class Buffer {
  public:
    T* of(std::int64_t size) {
        if (size > size_) {
            data_.reset();
            data_.reset(static_cast<T*>(::operator new(std::size_t(size) * sizeof(T), std::align_val_t{64})));
            size_ = size;
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<T, Free> data_;
    std::int64_t size_ = 0;
};

// Memory for quantised rows.
struct ActivationBuffer {
    Buffer<std::int8_t> values;
    Buffer<float> scales;
    Buffer<std::int32_t> group_sums, span_sums;
    std::int64_t rows = 0, depth = 0;

    void reserve(std::int64_t rows, std::int64_t depth);
    Activations part(std::int64_t first, std::int64_t count) const;
    void copy_row(std::int64_t row, const ActivationBuffer& from, std::int64_t source);

  private:
    std::int8_t* values_ = nullptr;
    float* scales_ = nullptr;
    std::int32_t *group_sums_ = nullptr, *span_sums_ = nullptr;
    friend class Machine;
};

// Memory for rows of integers.
struct IntegerBuffer {
    Buffer<std::int8_t> halves;
    Buffer<std::int32_t> sums;
    Buffer<float> scales;
    RowIntegers of(std::int64_t rows, std::int64_t width);
};

// Calls from several threads take turns.
class Machine {
  public:
    // `threads`: the caller's and threads - 1 of its own.
    Machine(const Kernels& kernels, int threads);

    const Kernels& kernels() const { return kernels_; }
    int threads() const { return pool_.size(); }

    // output [rows, out] = x [rows, in] times the layer's weight, plus its bias.
    void linear(const Rows& x, const Linear& layer, const Rows& output);

    // output [rows, hidden] = the layer of x [rows, hidden].
    void swiglu(const Rows& x, const SwiGLU& layer, const Rows& output);

    // output [rows, hidden] = the sum over k of weights[row, k] times expert number chosen[row, k] of x[row], in the
    // order of the experts' numbers, plus the shared one. `chosen` [rows, per_token] are below the experts' count.
    void mix_experts(const Rows& x, const float* weights, const std::int64_t* chosen, std::int64_t per_token,
                     const Experts& experts, const Rows& output);

    // output [rows, width / 2] = silu(gate) * up of rows [gate | up], both factors rounded to the rows' type.
    void silu_mul(const Rows& gate_up, const Rows& output);

    // residual = residual + delta (null: nothing), normed = residual / rms(residual) * weight, rounded to the rows' type
    // after each step. `weight` is one row.
    void add_rms_norm(const Rows* delta, const Rows& residual, const Rows& weight, float eps, const Rows& normed,
                      const Rows& new_residual);

    // The experts of each row of x: weights and numbers [rows, per_token]. `router` [experts, width], `bias` [experts].
    void route(const Rows& x, const float* router, const float* bias, std::int64_t experts, std::int64_t per_token,
               float norm_min, float* weights, std::int64_t* chosen);

    // qkv [rows, (heads + 2 kv_heads) * head_dim]: queries and keys turned by cosines, sines [rows, head_dim]; queries to
    // `queries` [rows, heads * head_dim], keys and values to the cache's slots [rows].
    void rotate_and_store(const Rows& qkv, const float* cosines, const float* sines, const std::int64_t* slots,
                          const Cache& cache, const Rows& queries);

    // Causal attention of queries [rows, heads * head_dim] over the cache, which holds the rows' own keys already.
    void attend(const Rows& queries, const Cache& cache, const Sequences& sequences, const Rows& output);

    // The largest of each row of logits [rows, width] and where it first stands; NaN is the largest of all.
    void largest(const float* logits, std::int64_t rows, std::int64_t width, float* peaks, std::int64_t* ids);

    // A number drawn for each row, by draws[row], from logits whose largest are `peaks`. The logits are overwritten.
    void draw(float* logits, std::int64_t rows, std::int64_t width, const float* peaks, const Draw* draws,
              std::int64_t* ids);

    // Round a weight [rows, width] to 4 or 8 bits. Its rows become columns, each of `parts` equal parts rounded up to
    // whole panels: weight.columns in all.
    void pack(const Rows& weight, int bits, std::int64_t parts, std::uint8_t* values, std::uint8_t* factors,
              float* scales);

    // Bytes a second that all threads read together from `count` bytes, and operations a second in products of bytes.
    double read_rate(const std::uint8_t* bytes, std::int64_t count);
    double peak_rate();

  private:
    struct Task;   // rows of one SwiGLU
    struct Queries;  // query rows of one head, and what they have seen
    struct Thread {  // one thread's memory
        Buffer<float> row, other_row, product, mixed, queries, scores, states;
        Buffer<std::uint8_t> scratch;
        Buffer<std::uint16_t> narrow;
        Buffer<std::int32_t> visible;
        IntegerBuffer query_integers, weights;
        Buffer<const char*> value_quads;
        std::vector<const void*> keys, values;
    };

    void quantise(const float* row, ActivationBuffer& into, std::int64_t at);
    void quantise_rows(const Rows& x, ActivationBuffer& into, std::int64_t depth);
    void run_layer(const std::vector<Task>& tasks, const Rows& output);
    const float* load(const Rows& x, std::int64_t row, std::int64_t column, std::int64_t count, float* buffer);
    void round(float* row, std::int64_t count, FloatType type, Thread& memory);
    void see(const Queries& q, const Cache& cache, const Sequences& sequences, std::int64_t split, float* state,
             Thread& memory);
    const char* encode(const float* floats, const Cache& cache, Thread& memory);
    void store_key(const float* key, const Cache& cache, char* block, std::int64_t offset, Thread& memory);
    void store_value(const float* value, const Cache& cache, char* block, std::int64_t offset, Thread& memory);
    void load_queries(const Queries& q, const Rows& queries, const Cache& cache, Thread& memory);
    void store(const float* row, std::int64_t count, const Rows& output, std::int64_t at, std::int64_t column);

    const Kernels& kernels_;
    ThreadPool pool_;
    std::mutex turn_;  // the buffers below belong to one call at a time
    std::vector<Thread> memory_;
    ActivationBuffer tokens_, pairs_, inner_, shared_inner_;
    Buffer<float> gated_, shared_gated_, pair_weights_, states_;
    Buffer<std::int32_t> pair_tokens_;
    Buffer<std::int64_t> starts_, next_, places_;
};

}  // namespace tern
