// Bindings of csrc/cpu/gold.
#include <pybind11/stl.h>

#include <memory>

#include "bindings/arrays.h"
#include "bindings/cpu_arguments.h"
#include "cpu/gold.h"

namespace xtoken {

void bind_cpu_gold(py::module_& m) {
    using namespace cpu;
    py::class_<GoldPlan>(m, "CpuGoldPlan", "Layouts of common pairs for the CPU kernels.")
        .def(py::init([](const Array<int64_t>& student_ids, const Array<int64_t>& teacher_ids, int64_t students,
                         int64_t teachers) {
                 if (student_ids.size() != teacher_ids.size()) {
                     value_error("teacher_ids: expected ", student_ids.size(), " ids (as student_ids), got ",
                                 teacher_ids.size());
                 }
                 return std::make_unique<GoldPlan>(student_ids.data(), teacher_ids.data(), student_ids.size(), students,
                                                   teachers);
             }),
             py::arg("student_ids"), py::arg("teacher_ids"), py::arg("students"), py::arg("teachers"));
    m.def(
        "cpu_gold",
        [](const GoldPlan* plan, const LogitsArgument& student, const LogitsArgument& teacher,
           const LogitsArgument& grad, const RowsArgument& student_rows, const RowsArgument& teacher_rows,
           int64_t chunks, uintptr_t scale, uintptr_t losses, double temperature, bool reverse, int64_t top_k,
           float lowest, const std::string& level, int threads) {
            const GoldParams params{to_logits(student),
                                    to_logits(teacher),
                                    to_logits(grad),
                                    to_rows(student_rows),
                                    to_rows(teacher_rows),
                                    chunks,
                                    address<const double>(scale),
                                    address<double>(losses),
                                    temperature,
                                    reverse,
                                    top_k,
                                    lowest,
                                    plan == nullptr ? GoldPlanView{} : plan->view()};
            const Level chosen = level_of(level);
            py::gil_scoped_release release;
            gold(params, chosen, threads);
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"),
        py::arg("teacher_rows"), py::arg("chunks"), py::arg("scale"), py::arg("losses"), py::arg("temperature"),
        py::arg("reverse"), py::arg("top_k"), py::arg("lowest"), py::arg("level"), py::arg("threads"));
}

}  // namespace xtoken
