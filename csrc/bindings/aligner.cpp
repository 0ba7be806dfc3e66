// Bindings of core/aligner.h.
#include "core/aligner.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "core/align_dp.h"

namespace xtoken {
namespace {

using Rows = std::vector<Array<int64_t>>;
using Masks = std::optional<std::vector<Array<uint8_t>>>;

// One side of a batch; the rows view the arrays. Checks that the masks fit the ids.
std::vector<TokenRow> to_rows(const char* name, const Rows& ids, const Masks& masks) {
    bool fits = !masks || masks->size() == ids.size();
    std::vector<TokenRow> rows;
    rows.reserve(ids.size());
    for (size_t b = 0; fits && b < ids.size(); ++b) {
        fits = ids[b].ndim() == 1 && (!masks || ((*masks)[b].ndim() == 1 && (*masks)[b].size() == ids[b].size()));
        rows.push_back({ids[b].data(), masks ? (*masks)[b].data() : nullptr, ids[b].size()});
    }
    if (!fits) value_error(name, "_mask: expected the shape of ", name, "_ids, one entry a token");
    return rows;
}

template <typename T>
py::capsule owner_of(Buffer<T>& buffer) {
    return {buffer.data.release(), [](void* p) { std::free(p); }};
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
            [](const Aligner& aligner, const Rows& student_ids, const Masks& student_masks, const Rows& teacher_ids,
               const Masks& teacher_masks, AlignMethod method, int64_t cell_budget, int threads) {
                const std::vector<TokenRow> student = to_rows("student", student_ids, student_masks);
                const std::vector<TokenRow> teacher = to_rows("teacher", teacher_ids, teacher_masks);
                BatchAlignment result;
                {
                    py::gil_scoped_release release;
                    result = aligner.align(student, teacher, method, cell_budget, threads);
                }
                static_assert(sizeof(Span) == 4 * sizeof(int32_t), "a Span is a row of four integers");
                const auto chunks = static_cast<py::ssize_t>(result.spans.size);
                const auto* spans = reinterpret_cast<const int32_t*>(result.spans.data.get());
                const auto* predicted = reinterpret_cast<const bool*>(result.predicted.data.get());
                return py::make_tuple(py::array_t<int32_t>({chunks, py::ssize_t{4}}, spans, owner_of(result.spans)),
                                      to_array<int64_t>(std::move(result.offsets)),
                                      py::array_t<bool>(chunks, predicted, owner_of(result.predicted)),
                                      to_array<bool>(std::move(result.optimal)));
            },
            py::arg("student_ids"), py::arg("student_masks"), py::arg("teacher_ids"), py::arg("teacher_masks"),
            py::arg("method"), py::arg("cell_budget"), py::arg("threads"));
}

}  // namespace xtoken
