// Bindings of core/projection.h.
#include "core/projection.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "bindings/arrays.h"

namespace xtoken {

Sequences to_sequences(const Array<int64_t>& ptr, const Array<int32_t>& ids, size_t count, int32_t vocabulary_size) {
    Sequences pieces{to_vector(ptr, "piece_ptr"), to_vector(ids, "piece_ids")};
    bool fits = pieces.ptr.size() == count + 1 && pieces.ptr[0] == 0;
    for (size_t k = 0; fits && k < count; ++k) fits = pieces.ptr[k] <= pieces.ptr[k + 1];
    if (!fits || pieces.ptr.back() != static_cast<int64_t>(pieces.ids.size())) {
        value_error("piece_ptr: does not describe ", count, " sequences of ", pieces.ids.size(), " pieces");
    }
    for (const int32_t id : pieces.ids) {
        if (id < 0 || id >= vocabulary_size) {
            value_error("piece_ids: token id ", id, " is outside the vocabulary of ", vocabulary_size, " tokens");
        }
    }
    return pieces;
}

namespace {

py::tuple to_tuple(SparseRows&& rows) {
    return py::make_tuple(to_array<int64_t>(std::move(rows.row_ptr)), to_array<int32_t>(std::move(rows.col)),
                          to_array<float>(std::move(rows.weight)));
}

PieceWeights to_weights(double beta, double gamma, int32_t top_k) {
    if (!(beta > 0 && beta <= 1)) value_error("beta: expected 0 < beta <= 1, got ", beta);
    if (!(gamma >= 0 && gamma < 1)) value_error("gamma: expected 0 <= gamma < 1, got ", gamma);
    if (top_k < 1) value_error("top_k: expected at least 1, got ", top_k);
    return {beta, gamma, top_k};
}

}  // namespace

void bind_projection(py::module_& m) {
    m.attr("row_kinds") = py::make_tuple("none", "exact", "role", "pieces", "given", "partial");

    m.def(
        "exact_images",
        [](const Vocabulary& student, const Vocabulary& teacher, bool fold_space_punctuation) {
            ExactImages images = exact_images(student, teacher, CanonicalRules{fold_space_punctuation});
            return py::make_tuple(to_array<int32_t>(std::move(images.image)),
                                  to_array<uint8_t>(std::move(images.kind)));
        },
        py::arg("student"), py::arg("teacher"), py::arg("fold_space_punctuation"));

    py::class_<LongestMatch>(m, "LongestMatch")
        .def(py::init<const Vocabulary&>(), py::arg("vocabulary"), py::keep_alive<1, 2>())
        .def("encode", [](const LongestMatch& matcher, const py::bytes& text) {
            std::vector<int32_t> ids;
            matcher.encode(std::string_view(text), ids);
            return ids;
        });

    m.def(
        "build_rows",
        [](const Array<int32_t>& image, const Array<int32_t>& rows, const Array<int64_t>& piece_ptr,
           const Array<int32_t>& piece_ids, int32_t teacher_size, double beta, double gamma, int32_t top_k) {
            const std::vector<int32_t> pending = to_vector(rows, "rows");
            return to_tuple(build_rows(to_vector(image, "image"), pending,
                                       to_sequences(piece_ptr, piece_ids, pending.size(), teacher_size),
                                       to_weights(beta, gamma, top_k)));
        },
        py::arg("image"), py::arg("rows"), py::arg("piece_ptr"), py::arg("piece_ids"), py::arg("teacher_size"),
        py::arg("beta"), py::arg("gamma"), py::arg("top_k"));

    m.def(
        "add_reverse",
        [](const Array<int64_t>& row_ptr, const Array<int32_t>& col, const Array<float>& weight,
           const Array<int32_t>& columns, const Array<int64_t>& piece_ptr, const Array<int32_t>& piece_ids, double beta,
           double gamma, int32_t top_k) {
            const Sequences rows =
                to_sequences(row_ptr, col, static_cast<size_t>(std::max<py::ssize_t>(row_ptr.size(), 1) - 1),
                             std::numeric_limits<int32_t>::max());
            const SparseRows matrix{rows.ptr, rows.ids, to_vector(weight, "weight")};
            if (weight.size() != col.size()) value_error("weight: expected one weight an entry of col");
            const std::vector<int32_t> unreached = to_vector(columns, "columns");
            const auto student_size = static_cast<int32_t>(matrix.row_ptr.size()) - 1;
            return to_tuple(add_reverse(matrix, unreached,
                                        to_sequences(piece_ptr, piece_ids, unreached.size(), student_size),
                                        to_weights(beta, gamma, top_k)));
        },
        py::arg("row_ptr"), py::arg("col"), py::arg("weight"), py::arg("columns"), py::arg("piece_ptr"),
        py::arg("piece_ids"), py::arg("beta"), py::arg("gamma"), py::arg("top_k"));
}

}  // namespace xtoken
