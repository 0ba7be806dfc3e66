// The Python module xtoken._core: build facts, the one error translator, and the parts.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "bindings/errors.h"
#include "bindings/launch.h"
#include "core/chunk_rows.h"
#include "core/cpu_features.h"
#include "core/digest.h"
#include "core/parallel.h"
#include "core/sliced.h"
#include "cpu/dispatch.h"

namespace xtoken {
namespace {

BatchChunks batch_chunks(const Array<int32_t>& spans, const Array<int64_t>& offsets) {
    if (spans.ndim() != 2 || spans.shape(1) != 4) value_error("spans: expected shape [K, 4]");
    return {reinterpret_cast<const Span*>(spans.data()), spans.shape(0), offsets.data(), offsets.size() - 1};
}

PYBIND11_MODULE(_core, m) {
    m.doc() = "The C++ core of xtoken; use the functions of the package xtoken instead.";
    register_error_translator();
    m.attr("version") = XTOKEN_VERSION;
    m.attr("compiler") = XTOKEN_COMPILER;
    m.attr("build_type") = XTOKEN_BUILD_TYPE;
    m.def("cpu_features", &cpu_features, "Instruction sets of this processor.");
    m.def("available_processors", &available_processors, "Processors that this process may run on.");
    bind_vocabulary(m);
    bind_align_dp(m);
    bind_aligner(m);
    bind_projection(m);
    bind_piece_index(m);
    bind_built(m);
    m.def(
        "sliced_lists",
        [](const Array<int64_t>& begin, const Array<int32_t>& counts, int64_t lanes, int64_t longest) {
            if (lanes < 1 || longest < 0 || begin.ndim() != 1 || begin.size() != counts.size()) {
                value_error("begin: expected one for each list, lanes, and a length");
            }
            SlicedLists made(to_vector(counts, "counts"), lanes, longest);
            std::vector<int64_t> source(made.size(), -1);
            for (int64_t n = 0; n < made.lists(); ++n) {
                made.each_entry(n, counts.at(n), [&](int64_t at, int64_t i) { source[at] = begin.at(n) + i; });
            }
            return py::make_tuple(made.shared, to_array<int64_t>(std::move(made.start)),
                                  to_array<int64_t>(std::move(source)), to_array<int32_t>(std::move(made.place)));
        },
        py::arg("begin"), py::arg("counts"), py::arg("lanes"), py::arg("longest"),
        "See core/sliced.h; `source` is -1 where a slice has none.");
    m.def(
        "wrong_chunk",
        [](const Array<int32_t>& spans, const Array<int64_t>& offsets) {
            return wrong_chunk(batch_chunks(spans, offsets));
        },
        py::arg("spans"), py::arg("offsets"), "See core/chunk_rows.h.");
    m.def(
        "predictor_rows",
        [](const Array<int32_t>& spans, const Array<int64_t>& offsets, const Array<bool>& predicted) {
            const BatchChunks chunks = batch_chunks(spans, offsets);
            if (predicted.size() != chunks.count) value_error("predicted: expected one for each chunk");
            return to_array<int64_t>(predictor_rows(chunks, predicted.data()));
        },
        py::arg("spans"), py::arg("offsets"), py::arg("predicted"), "See core/chunk_rows.h.");
    m.def(
        "digest", [](const Array<uint8_t>& bytes) { return digest(bytes.data(), static_cast<size_t>(bytes.size())); },
        "A number that tells contents apart.");
    m.def("cpu_levels", &cpu::available_levels, "Levels of the CPU kernels that this processor can run.");
    m.def("cpu_level", &cpu::default_level, "The level that is used by default.");
    m.def(
        "launch",
        [](const std::string& name, const py::dict& fields, const std::string& level, int threads) {
            launch_named(name, fields, cpu::Launch{cpu::level_of(level), threads});
        },
        py::arg("name"), py::arg("fields"), py::arg("level"), py::arg("threads"), "Runs the kernels of that name.");
    m.def(
        "build",
        [](const std::string& name, const py::dict& fields) {
            const Builder& builder = Registry<Builder>::named(name);
            return builder.build(Params(builder, fields).get());
        },
        py::arg("name"), py::arg("fields"), "Makes what kernels take beside numbers: a plan.");
}

}  // namespace
}  // namespace xtoken
