// Bindings of csrc/cpu/prefix.
#include <pybind11/stl.h>

#include <memory>

#include "bindings/arrays.h"
#include "bindings/cpu_arguments.h"
#include "cpu/prefix.h"

namespace xtoken {

void bind_cpu_prefix(py::module_& m) {
    using namespace cpu;
    py::class_<PrefixPlan>(m, "CpuPrefixPlan", "A piece index, with the layout of its events for the CPU kernels.")
        .def(py::init(
                 [](const Array<int32_t>& data) { return std::make_unique<PrefixPlan>(to_vector(data, "pieces")); }),
             py::arg("data"));
    m.def(
        "cpu_prefix",
        [](const PrefixPlan& plan, const LogitsArgument& student, const LogitsArgument& teacher,
           const LogitsArgument& grad, const RowsArgument& student_rows, const RowsArgument& teacher_rows,
           int64_t chunks, uintptr_t scale, uintptr_t losses, const LabelsArgument& labels, double temperature,
           bool reverse, float lowest, const std::string& level, int threads) {
            const PrefixParams params{to_logits(student),
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
                                      plan.index(),
                                      plan.view(),
                                      nullptr,
                                      nullptr,
                                      0};
            const Level chosen = level_of(level);
            py::gil_scoped_release release;
            prefix(params, chosen, threads);
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"),
        py::arg("teacher_rows"), py::arg("chunks"), py::arg("scale"), py::arg("losses"), py::arg("labels"),
        py::arg("temperature"), py::arg("reverse"), py::arg("lowest"), py::arg("level"), py::arg("threads"));
}

}  // namespace xtoken
