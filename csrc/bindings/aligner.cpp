// Bindings of core/aligner.h.
#include "core/aligner.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "core/align_dp.h"

namespace xtoken {
namespace {

// One side of a batch as arrays; checks that the offsets fit the ids.
TokenBatch to_batch(const char* name, const Array<int64_t>& ids, const Array<int64_t>& offsets,
                    const std::optional<Array<uint8_t>>& mask) {
    const int64_t* ends = offsets.data();
    bool fits = ids.ndim() == 1 && offsets.ndim() == 1 && offsets.size() > 0 && ends[0] == 0;
    for (py::ssize_t b = 1; fits && b < offsets.size(); ++b) fits = ends[b - 1] <= ends[b];
    if (!fits || ends[offsets.size() - 1] != ids.size()) value_error(name, ": offsets do not fit the ids");
    if (mask && mask->size() != ids.size()) value_error(name, ": the mask has another size than the ids");
    return {ids.data(), ends, mask ? mask->data() : nullptr};
}

}  // namespace

void bind_aligner(py::module_& m) {
    py::native_enum<AlignMethod>(m, "AlignMethod", "enum.Enum")
        .value("auto", AlignMethod::automatic)
        .value("bytes", AlignMethod::bytes)
        .value("dp", AlignMethod::dp)
        .finalize();
    m.attr("default_cell_budget") = DpLimits{}.cell_budget;

    py::class_<Aligner>(m, "Aligner")
        .def(py::init([](const Vocabulary& student, const Vocabulary& teacher, bool fold_space_punctuation) {
                 return Aligner(student, teacher, CanonicalRules{fold_space_punctuation});
             }),
             py::arg("student"), py::arg("teacher"), py::arg("fold_space_punctuation"))
        .def(
            "align",
            [](const Aligner& aligner, const Array<int64_t>& student_ids, const Array<int64_t>& student_offsets,
               const std::optional<Array<uint8_t>>& student_mask, const Array<int64_t>& teacher_ids,
               const Array<int64_t>& teacher_offsets, const std::optional<Array<uint8_t>>& teacher_mask,
               AlignMethod method, int64_t cell_budget, int threads) {
                const TokenBatch student = to_batch("student_ids", student_ids, student_offsets, student_mask);
                const TokenBatch teacher = to_batch("teacher_ids", teacher_ids, teacher_offsets, teacher_mask);
                const int64_t samples = student_offsets.size() - 1;
                if (teacher_offsets.size() - 1 != samples) {
                    value_error("teacher_ids: expected ", samples, " samples, as student_ids has, got ",
                                teacher_offsets.size() - 1);
                }
                BatchAlignment result;
                {
                    py::gil_scoped_release release;
                    result = aligner.align(student, teacher, samples, method, cell_budget, threads);
                }
                static_assert(sizeof(Span) == 4 * sizeof(int32_t), "a Span is a row of four integers");
                return py::make_tuple(
                    to_array<int32_t>(std::move(result.spans), 4), to_array<int64_t>(std::move(result.offsets)),
                    to_array<uint8_t>(std::move(result.predicted)), to_array<uint8_t>(std::move(result.optimal)));
            },
            py::arg("student_ids"), py::arg("student_offsets"), py::arg("student_mask"), py::arg("teacher_ids"),
            py::arg("teacher_offsets"), py::arg("teacher_mask"), py::arg("method"), py::arg("cell_budget"),
            py::arg("threads"));
}

}  // namespace xtoken
