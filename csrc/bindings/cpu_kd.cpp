// Bindings of csrc/cpu/kd, csrc/cpu/cross_entropy and csrc/cpu/columns.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "bindings/cpu_arguments.h"
#include "cpu/columns.h"
#include "cpu/cross_entropy.h"
#include "cpu/kd.h"

namespace xtoken {

void bind_cpu_kd(py::module_& m) {
    using namespace cpu;
    m.def(
        "cpu_kd",
        [](const LogitsArgument& student, const LogitsArgument& teacher, const LogitsArgument& grad,
           const RowsArgument& student_rows, const RowsArgument& teacher_rows, int64_t chunks, uintptr_t scale,
           uintptr_t losses, const LabelsArgument& labels, double temperature, bool reverse, float lowest,
           const std::optional<Array<int32_t>>& columns, const std::string& level, int threads) {
            const KdParams params{to_logits(student),
                                  to_logits(teacher),
                                  to_logits(grad),
                                  to_rows(student_rows),
                                  to_rows(teacher_rows),
                                  chunks,
                                  address<const double>(scale),
                                  address<double>(losses),
                                  temperature,
                                  reverse,
                                  lowest,
                                  to_labels(labels),
                                  {}};
            const Level chosen = level_of(level);
            const int32_t* ids = columns ? columns->data() : nullptr;
            const int64_t count = columns ? columns->size() : 0;
            py::gil_scoped_release release;
            kd(params, ids, count, chosen, threads);
        },
        py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"), py::arg("teacher_rows"),
        py::arg("chunks"), py::arg("scale"), py::arg("losses"), py::arg("labels"), py::arg("temperature"),
        py::arg("reverse"), py::arg("lowest"), py::arg("columns"), py::arg("level"), py::arg("threads"));
    m.def(
        "cpu_cross_entropy",
        [](const LogitsArgument& student, const LogitsArgument& grad, const LabelsArgument& labels, float lowest,
           const std::string& level, int threads) {
            const CrossEntropyParams params{to_logits(student), to_logits(grad), to_labels(labels), lowest, true};
            const Level chosen = level_of(level);
            py::gil_scoped_release release;
            cross_entropy(params, chosen, threads);
        },
        py::arg("student"), py::arg("grad"), py::arg("labels"), py::arg("lowest"), py::arg("level"),
        py::arg("threads"));
    m.def(
        "cpu_largest_columns",
        [](const LogitsArgument& logits, int64_t count, uintptr_t ids, const std::string& level, int threads) {
            const Logits given = to_logits(logits);
            const Level chosen = level_of(level);
            py::gil_scoped_release release;
            largest_columns(given, count, address<int64_t>(ids), chosen, threads);
        },
        py::arg("logits"), py::arg("count"), py::arg("ids"), py::arg("level"), py::arg("threads"));
}

}  // namespace xtoken
