// The Python door: `tern.ops.cpu._kernels`. Memory crosses it as addresses, which `tern.ops.cpu` takes from tensors after
// it has checked their types and sizes; here only what would make a kernel read out of bounds is checked again.
// Every call releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "emulated_tiles.h"
#include "machine.h"

namespace nb = nanobind;

namespace tern {
namespace {

using Address = std::uintptr_t;

// By priority, the best first. What stands after the portable ones is never chosen unless it is named.
const Kernels* const kAllKernels[] = {
#if defined(TERN_AMX_KERNELS)
    &kAmx,
#endif
#if defined(TERN_X86_KERNELS)
    &kAvx512Vnni,
    &kAvxVnni,
    &kAvx2,
#endif
    &kPortable,
#if defined(TERN_X86_KERNELS)
    &kAmxEmulated,
#endif
};

void demand(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

PackedWeight packed_weight(int bits, Address values, Address factors, Address scales, std::int64_t columns,
                           std::int64_t depth) {
    demand(bits == 4 || bits == 8, "a packed weight has 4 or 8 bits");
    demand(columns > 0 && columns % kPanel == 0, "columns must be a multiple of 16");
    demand(depth > 0 && depth % kGroup == 0, "the depth must be a multiple of 32");
    demand((bits == 4) == (factors != 0), "4-bit weights have factors, 8-bit ones have none");
    return {bits, at<const std::uint8_t>(values), at<const std::uint8_t>(factors), at<const float>(scales), columns, depth};
}

Linear linear_layer(const PackedWeight& weight, Address bias, std::int64_t out) {
    demand(0 < out && out <= weight.columns, "a layer cannot have more outputs than columns");
    return {weight, at<const float>(bias), out};
}

SwiGLU swiglu_layer(const Linear& gate_up, const Linear& down) {
    demand(gate_up.weight.columns % (2 * kPanel) == 0, "gate and up must be whole panels");
    demand(gate_up.weight.columns / 2 <= down.weight.depth, "down is not as deep as gate is wide");
    return {gate_up, down};
}

Rows rows(Address data, const std::string& type, std::int64_t count, std::int64_t width) {
    demand(type == "float32" || type == "bfloat16", "rows are float32 or bfloat16");
    return {at<void>(data), type == "bfloat16" ? FloatType::bf16 : FloatType::f32, count, width};
}

void demand_fit(const Rows& x, const Linear& first, const Linear& last, const Rows& output) {
    demand(x.width <= first.weight.depth, "x is wider than the weight is deep");
    demand(output.width == last.out, "the output has not the layer's width");
    demand(x.count == output.count, "x and output differ in rows");
}

Cache cache(Address keys, Address values, std::int64_t num_blocks, std::int64_t block_size, std::int64_t kv_heads,
            std::int64_t head_dim, std::int64_t element_bytes) {
    demand(element_bytes == 1 || element_bytes == 2 || element_bytes == 4, "a cache holds int8, bfloat16 or float32");
    demand(block_size > 0 && kv_heads > 0 && head_dim > 0 && head_dim % kPanel == 0, "head_dim must be a multiple of 16");
    demand(element_bytes > 1 || block_size % kQuad == 0, "a block of int8 values must hold a multiple of 4 tokens");
    return {at<char>(keys), at<char>(values), num_blocks, block_size, kv_heads, head_dim, element_bytes};
}

// Every number that a kernel will follow must lead into the cache and into the rows.
void demand_within(const Sequences& s, const Cache& cache, const Rows& queries) {
    demand(queries.width % (cache.head_dim * cache.kv_heads) == 0, "query heads are no multiple of key heads");
    for (std::int64_t i = 0; i < s.count; ++i) {
        const std::int64_t first = s.query_starts[i], end = s.query_starts[i + 1], context = s.context_lens[i];
        demand(0 <= first && first <= end && end <= queries.count, "a sequence's queries are not among the rows");
        if (first == end) continue;
        demand(end - first <= context, "a sequence has more queries than positions");
        const std::int64_t blocks = (context + cache.block_size - 1) / cache.block_size;
        demand(blocks <= s.max_blocks, "a sequence's block table is too short");
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t number = s.block_tables[i * s.max_blocks + block];
            demand(0 <= number && number < cache.num_blocks, "there is no such block");
        }
    }
}

const Kernels& kernels_called(const std::string& name) {
    for (const Kernels* kernels : kAllKernels)
        if (name == kernels->name) {
            demand(kernels->runs_on(cpu_features()), "this processor lacks the instruction set");
            return *kernels;
        }
    throw std::invalid_argument("there are no kernels of that name");
}

nb::list instruction_sets() {
    nb::list found;
    for (const Kernels* kernels : kAllKernels)
        found.append(nb::make_tuple(kernels->name, kernels->description, kernels->runs_on(cpu_features())));
    return found;
}

}  // namespace
}  // namespace tern

NB_MODULE(_kernels, m) {
    using namespace tern;
    m.def("instruction_sets", instruction_sets);
    nb::class_<PackedWeight>(m, "PackedWeight").def_ro("columns", &PackedWeight::columns).def_ro("depth", &PackedWeight::depth);
    nb::class_<Linear>(m, "Linear");
    nb::class_<SwiGLU>(m, "SwiGLU");
    nb::class_<Experts>(m, "Experts");
    nb::class_<Rows>(m, "Rows");
    m.def("packed_weight", packed_weight, nb::arg("bits"), nb::arg("values"), nb::arg("factors"), nb::arg("scales"),
          nb::arg("columns"), nb::arg("depth"));
    m.def("linear_layer", linear_layer, nb::arg("weight"), nb::arg("bias"), nb::arg("out"));
    m.def("swiglu_layer", swiglu_layer, nb::arg("gate_up"), nb::arg("down"));
    m.def("experts", [](const SwiGLU& first, std::int64_t count, const SwiGLU* shared) {
        demand(count > 0, "there must be an expert");
        demand(!shared || shared->down.out == first.down.out, "the shared expert differs in width");
        return Experts{first, count, shared != nullptr, shared ? *shared : SwiGLU{}};
    }, nb::arg("first"), nb::arg("count"), nb::arg("shared").none());
    nb::class_<Draw>(m, "Draw").def("__init__", [](Draw* self, double uniform, float temperature, float floor,
                                                   std::int64_t top_k, double top_p) {
        demand(temperature > 0.0f && top_k > 0, "a draw has a temperature above 0 and a top_k of at least 1");
        new (self) Draw{uniform, top_p, top_k, temperature, floor};
    }, nb::arg("uniform"), nb::arg("temperature"), nb::arg("floor"), nb::arg("top_k"), nb::arg("top_p"));
    nb::class_<Cache>(m, "Cache");
    m.def("cache", cache, nb::arg("keys"), nb::arg("values"), nb::arg("num_blocks"), nb::arg("block_size"),
          nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("element_bytes"));
    m.def("rows", rows, nb::arg("data"), nb::arg("type"), nb::arg("count"), nb::arg("width"));

    nb::class_<EmulatedTiles>(m, "EmulatedTiles")
        .def(nb::init<>())
        .def("configure", [](EmulatedTiles& self, const nb::bytes& config) {
            demand(config.size() == sizeof(TileConfig), "a configuration is 64 bytes");
            TileConfig shapes;
            std::memcpy(&shapes, config.c_str(), sizeof shapes);
            self.configure(shapes);
        }, nb::arg("config"))
        .def("release", &EmulatedTiles::release)
        .def("clear", &EmulatedTiles::clear, nb::arg("tile"))
        .def("load", [](EmulatedTiles& self, int tile, Address memory, std::int64_t stride) {
            self.load(tile, at<const void>(memory), stride);
        }, nb::arg("tile"), nb::arg("memory"), nb::arg("stride"))
        .def("store", [](const EmulatedTiles& self, int tile, Address memory, std::int64_t stride) {
            self.store(tile, at<void>(memory), stride);
        }, nb::arg("tile"), nb::arg("memory"), nb::arg("stride"))
        .def("add_products", &EmulatedTiles::add_products, nb::arg("sums"), nb::arg("a"), nb::arg("b"))
        .def("add_pairs", &EmulatedTiles::add_pairs, nb::arg("sums"), nb::arg("a"), nb::arg("b"))
        .def_prop_ro("products", &EmulatedTiles::products);
    m.def("emulated_tiles", emulated_tiles, nb::rv_policy::reference);

    nb::class_<Machine>(m, "Machine")
        .def("__init__", [](Machine* self, const std::string& name, int threads) {
            demand(threads >= 1 && threads <= 1024, "threads must be from 1 to 1024");
            new (self) Machine(kernels_called(name), threads);
        }, nb::arg("name"), nb::arg("threads"))
        .def_prop_ro("name", [](const Machine& self) { return std::string(self.kernels().name); })
        .def_prop_ro("threads", &Machine::threads)
        .def("linear", [](Machine& self, const Rows& x, const Linear& layer, const Rows& output) {
            demand_fit(x, layer, layer, output);
            const nb::gil_scoped_release released;
            self.linear(x, layer, output);
        }, nb::arg("x"), nb::arg("layer"), nb::arg("output"))
        .def("swiglu", [](Machine& self, const Rows& x, const SwiGLU& layer, const Rows& output) {
            demand_fit(x, layer.gate_up, layer.down, output);
            const nb::gil_scoped_release released;
            self.swiglu(x, layer, output);
        }, nb::arg("x"), nb::arg("layer"), nb::arg("output"))
        .def("read_rate", [](Machine& self, Address bytes, std::int64_t count) {
            const nb::gil_scoped_release released;
            return self.read_rate(at<const std::uint8_t>(bytes), count);
        }, nb::arg("bytes"), nb::arg("count"))
        .def("peak_rate", &Machine::peak_rate, nb::call_guard<nb::gil_scoped_release>())
        .def("pack", [](Machine& self, const Rows& weight, int bits, std::int64_t parts, Address values, Address factors,
                        Address scales) {
            demand(bits == 4 || bits == 8, "a packed weight has 4 or 8 bits");
            demand(parts > 0 && weight.count > 0 && weight.width > 0 && weight.count % parts == 0,
                   "the weight cannot be cut into so many parts");
            const nb::gil_scoped_release released;
            self.pack(weight, bits, parts, at<std::uint8_t>(values), at<std::uint8_t>(factors), at<float>(scales));
        }, nb::arg("weight"), nb::arg("bits"), nb::arg("parts"), nb::arg("values"), nb::arg("factors"), nb::arg("scales"))
        .def("silu_mul", [](Machine& self, const Rows& gate_up, const Rows& output) {
            demand(gate_up.count == output.count && gate_up.width == 2 * output.width && gate_up.type == output.type,
                   "the output is not half of the rows");
            const nb::gil_scoped_release released;
            self.silu_mul(gate_up, output);
        }, nb::arg("gate_up"), nb::arg("output"))
        .def("add_rms_norm", [](Machine& self, const Rows* delta, const Rows& residual, const Rows& weight, float eps,
                                const Rows& normed, const Rows& new_residual) {
            const auto alike = [&](const Rows& r) {
                return r.count == residual.count && r.width == residual.width && r.type == residual.type;
            };
            demand(alike(normed) && alike(new_residual) && (!delta || alike(*delta)), "the rows are not alike");
            demand(weight.count == 1 && weight.width == residual.width, "the norm has another width than the rows");
            const nb::gil_scoped_release released;
            self.add_rms_norm(delta, residual, weight, eps, normed, new_residual);
        }, nb::arg("delta").none(), nb::arg("residual"), nb::arg("weight"), nb::arg("eps"), nb::arg("normed"),
           nb::arg("new_residual"))
        .def("route", [](Machine& self, const Rows& x, Address router, Address bias, std::int64_t experts,
                         std::int64_t per_token, float norm_min, Address weights, Address chosen) {
            demand(0 < per_token && per_token <= experts, "a token cannot choose so many experts");
            const nb::gil_scoped_release released;
            self.route(x, at<const float>(router), at<const float>(bias), experts, per_token, norm_min,
                       at<float>(weights), at<std::int64_t>(chosen));
        }, nb::arg("x"), nb::arg("router"), nb::arg("bias"), nb::arg("experts"), nb::arg("per_token"),
           nb::arg("norm_min"), nb::arg("weights"), nb::arg("chosen"))
        .def("rotate_and_store", [](Machine& self, const Rows& qkv, Address cosines, Address sines, Address slots,
                                    const Cache& cache, const Rows& queries) {
            demand(qkv.width == queries.width + 2 * cache.kv_heads * cache.head_dim && qkv.count == queries.count,
                   "queries, keys and values do not make up the rows");
            const std::int64_t* places = at<const std::int64_t>(slots);
            for (std::int64_t row = 0; row < qkv.count; ++row)
                demand(0 <= places[row] && places[row] < cache.num_blocks * cache.block_size, "there is no such slot");
            const nb::gil_scoped_release released;
            self.rotate_and_store(qkv, at<const float>(cosines), at<const float>(sines), places, cache, queries);
        }, nb::arg("qkv"), nb::arg("cosines"), nb::arg("sines"), nb::arg("slots"), nb::arg("cache"), nb::arg("queries"))
        .def("attend", [](Machine& self, const Rows& queries, const Cache& cache, Address query_starts,
                          Address context_lens, Address block_tables, std::int64_t count, std::int64_t max_blocks,
                          const Rows& output) {
            const Sequences sequences{at<const std::int64_t>(query_starts), at<const std::int64_t>(context_lens),
                                      at<const std::int64_t>(block_tables), count, max_blocks};
            demand(output.count == queries.count && output.width == queries.width, "the output is not like the queries");
            demand_within(sequences, cache, queries);
            const nb::gil_scoped_release released;
            self.attend(queries, cache, sequences, output);
        }, nb::arg("queries"), nb::arg("cache"), nb::arg("query_starts"), nb::arg("context_lens"),
           nb::arg("block_tables"), nb::arg("count"), nb::arg("max_blocks"), nb::arg("output"))
        .def("largest", [](Machine& self, const Rows& logits, Address peaks, Address ids) {
            demand(logits.type == FloatType::f32 && logits.width > 0, "logits are rows of float32");
            const nb::gil_scoped_release released;
            self.largest(static_cast<const float*>(logits.data), logits.count, logits.width, at<float>(peaks),
                         at<std::int64_t>(ids));
        }, nb::arg("logits"), nb::arg("peaks"), nb::arg("ids"))
        .def("draw", [](Machine& self, const Rows& logits, Address peaks, const std::vector<Draw>& draws, Address ids) {
            demand(logits.type == FloatType::f32 && logits.width > 0, "logits are rows of float32");
            demand(std::int64_t(draws.size()) == logits.count, "there must be a draw for each row");
            const nb::gil_scoped_release released;
            self.draw(static_cast<float*>(logits.data), logits.count, logits.width, at<const float>(peaks), draws.data(),
                      at<std::int64_t>(ids));
        }, nb::arg("logits"), nb::arg("peaks"), nb::arg("draws"), nb::arg("ids"))
        .def("mix_experts", [](Machine& self, const Rows& x, Address weights, Address chosen, std::int64_t per_token,
                               const Experts& experts, const Rows& output) {
            demand_fit(x, experts.first.gate_up, experts.first.down, output);
            demand(per_token > 0, "a token must choose an expert");
            const std::int64_t* numbers = at<const std::int64_t>(chosen);
            for (std::int64_t i = 0; i < x.count * per_token; ++i)
                demand(0 <= numbers[i] && numbers[i] < experts.count, "there is no such expert");
            const nb::gil_scoped_release released;
            self.mix_experts(x, at<const float>(weights), numbers, per_token, experts, output);
        }, nb::arg("x"), nb::arg("weights"), nb::arg("chosen"), nb::arg("per_token"), nb::arg("experts"), nb::arg("output"));
}
