// Bindings of csrc/cpu. Tensors come as addresses and strides; their owners are the callers in xtoken/losses.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "bindings/cpu_arguments.h"
#include "cpu/dispatch.h"
#include "cpu/pkl.h"
#include "cpu/plan.h"
#include "cpu/simd_kernel.h"

namespace xtoken {
namespace {

const float* weights_of(const cpu::ColumnIndex& matrix, const Array<float>& weight) {
    if (weight.size() != matrix.entries()) {
        value_error("weight: expected ", matrix.entries(), " weights (the matrix's entries), got ", weight.size());
    }
    return weight.data();
}

cpu::Merge to_merge(const std::string& name) {
    if (name == "first") return cpu::Merge::first;
    if (name == "mean") return cpu::Merge::mean;
    if (name == "chain") return cpu::Merge::chain;
    value_error("merge: expected 'first', 'mean' or 'chain', got '", name, "'");
}

}  // namespace

void bind_cpu(py::module_& m) {
    using namespace cpu;
    m.def("cpu_levels", &available_levels, "Levels of the CPU kernels that this processor can run.");
    m.def("cpu_level", &default_level, "The level that is used by default.");

    m.def(
        "cpu_exp",
        [](const Array<float>& x, float centre, double temperature, const std::string& level) {
            Array<float> result(x.size());
            const double unit =
                XTOKEN_PICK(level_of(level), exp_array)(x.data(), x.size(), centre, temperature, result.mutable_data());
            return py::make_tuple(result, unit);
        },
        py::arg("x"), py::arg("centre"), py::arg("temperature"), py::arg("level"));
    m.def(
        "cpu_log",
        [](const Array<float>& x, const std::string& level) {
            Array<float> result(x.size());
            XTOKEN_PICK(level_of(level), log_array)(x.data(), x.size(), result.mutable_data());
            return result;
        },
        py::arg("x"), py::arg("level"));
    m.def(
        "cpu_to_float",
        [](const Array<uint16_t>& x, const std::string& element, const std::string& level) {
            Array<float> result(x.size());
            XTOKEN_PICK(level_of(level), to_float)(x.data(), to_element(element), x.size(), result.mutable_data());
            return result;
        },
        py::arg("x"), py::arg("element"), py::arg("level"));
    m.def(
        "cpu_from_float",
        [](const Array<float>& x, const std::string& element, const std::string& level) {
            Array<uint16_t> result(x.size());
            XTOKEN_PICK(level_of(level), from_float)(x.data(), to_element(element), x.size(), result.mutable_data());
            return result;
        },
        py::arg("x"), py::arg("element"), py::arg("level"));

    py::class_<ColumnIndex>(m, "CpuMatrix")
        .def(py::init([](const Array<int64_t>& row_ptr, const Array<int32_t>& col, int64_t teacher_size) {
                 return ColumnIndex(to_vector(row_ptr, "row_ptr"), to_vector(col, "col"), teacher_size);
             }),
             py::arg("row_ptr"), py::arg("col"), py::arg("teacher_size"));
    py::class_<Plan>(m, "CpuPlan")
        .def(py::init([](const ColumnIndex& matrix, const Array<float>& weight, const Array<int32_t>& columns) {
                 return Plan(matrix, weights_of(matrix, weight), to_vector(columns, "columns"));
             }),
             py::arg("matrix"), py::arg("weight"), py::arg("columns"))
        .def(
            "reweighted",
            [](const Plan& plan, const ColumnIndex& matrix, const Array<float>& weight) {
                return plan.reweighted(matrix, weights_of(matrix, weight));
            },
            py::arg("matrix"), py::arg("weight"))
        .def_property_readonly("entries", [](const Plan& plan) { return plan.view().entries; });
    m.def(
        "cpu_pkl",
        [](const Plan& plan, const LogitsArgument& student, const LogitsArgument& teacher, const LogitsArgument& grad,
           const RowsArgument& student_rows, const RowsArgument& teacher_rows, int64_t chunks, uintptr_t scale,
           uintptr_t losses, uintptr_t weight_grad, const LabelsArgument& labels, double temperature,
           const std::string& merge, bool reverse, float lowest, double epsilon, const std::string& level,
           int threads) {
            const PklParams params{to_logits(student),
                                   to_logits(teacher),
                                   to_logits(grad),
                                   to_rows(student_rows),
                                   to_rows(teacher_rows),
                                   chunks,
                                   address<const double>(scale),
                                   address<double>(losses),
                                   temperature,
                                   to_merge(merge),
                                   reverse,
                                   {lowest, epsilon},
                                   to_labels(labels),
                                   address<double>(weight_grad),
                                   plan.view()};
            const Level chosen = level_of(level);
            py::gil_scoped_release release;
            pkl(params, chosen, threads);
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"),
        py::arg("teacher_rows"), py::arg("chunks"), py::arg("scale"), py::arg("losses"), py::arg("weight_grad"),
        py::arg("labels"), py::arg("temperature"), py::arg("merge"), py::arg("reverse"), py::arg("lowest"),
        py::arg("epsilon"), py::arg("level"), py::arg("threads"));
}

}  // namespace xtoken
