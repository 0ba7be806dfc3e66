// The Python module xtoken._cuda: launchers of csrc/cuda. Tensors come as addresses; xtoken/losses/cuda.py owns them.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda_arguments.h"
#include "bindings/errors.h"
#include "cuda/cross_entropy.h"
#include "cuda/gold.h"
#include "cuda/kd.h"
#include "cuda/pkl.h"
#include "cuda/prefix.h"
#include "cuda/scale.h"

#ifndef XTOKEN_CUDA_MODULE
#define XTOKEN_CUDA_MODULE _cuda
#endif

namespace xtoken {
namespace {

namespace py = pybind11;
using namespace cuda;

using Free = py::call_guard<py::gil_scoped_release>;

Merge to_cuda_merge(const std::string& name) {
    if (name == "first") return Merge::first;
    if (name == "mean") return Merge::mean;
    if (name == "chain") return Merge::chain;
    value_error("merge: expected 'first', 'mean' or 'chain', got '", name, "'");
}

// (slices, shared, count, start, index, weight, wanted)
using ListsArgument = std::tuple<int32_t, int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Lists to_lists(const ListsArgument& a) {
    const auto [slices, shared, count, start, index, weight, wanted] = a;
    return {slices,
            shared,
            count,
            device_address<const int32_t>(start),
            device_address<const int32_t>(index),
            device_address<const float>(weight),
            device_address<const uint8_t>(wanted)};
}

// (students, columns, chosen, count, column_slot, row_slot, row_weight, column_lists, row_lists, entry_row,
// entry_column, entries)
using PlanArgument = std::tuple<int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, ListsArgument,
                                ListsArgument, uintptr_t, uintptr_t, int64_t>;

PklPlan to_plan(const PlanArgument& a) {
    const auto& [students, columns, chosen, count, column_slot, row_slot, row_weight, column_lists, row_lists,
                 entry_row, entry_column, entries] = a;
    return {students,
            columns,
            device_address<const int32_t>(chosen),
            device_address<const int32_t>(count),
            device_address<const int32_t>(column_slot),
            device_address<const int32_t>(row_slot),
            device_address<const float>(row_weight),
            to_lists(column_lists),
            to_lists(row_lists),
            device_address<const int64_t>(entry_row),
            device_address<const int64_t>(entry_column),
            entries};
}

// (pairs, student_rest, teacher_rest, student_pair, teacher_pair, student_others, teacher_others, slot)
using GoldPlanArgument = std::tuple<int32_t, int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

GoldPlan to_gold_plan(const GoldPlanArgument& a) {
    const auto [pairs, student_rest, teacher_rest, student_pair, teacher_pair, student_others, teacher_others, slot] =
        a;
    return {pairs,
            student_rest,
            teacher_rest,
            device_address<const int32_t>(student_pair),
            device_address<const int32_t>(teacher_pair),
            device_address<const int32_t>(student_others),
            device_address<const int32_t>(teacher_others),
            device_address<const int32_t>(slot)};
}

// (size, length, order, ptr, pieces)
using PrefixSideArgument = std::tuple<int32_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

PrefixSide to_prefix_side(const PrefixSideArgument& a) {
    const auto [size, length, order, ptr, pieces] = a;
    return {size, device_address<const int32_t>(length), device_address<const int32_t>(order),
            device_address<const int32_t>(ptr), device_address<const int32_t>(pieces)};
}

// (slices, shared, count, start, tokens, event)
using TokenListsArgument = std::tuple<int32_t, int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t>;

TokenLists to_token_lists(const TokenListsArgument& a) {
    const auto [slices, shared, count, start, tokens, event] = a;
    return {slices,
            shared,
            count,
            device_address<const int32_t>(start),
            device_address<const int32_t>(tokens),
            device_address<const int32_t>(event)};
}

// (student, teacher, slot, events, student_lists, teacher_lists, most)
using PrefixPlanArgument = std::tuple<PrefixSideArgument, PrefixSideArgument, uintptr_t, int32_t, TokenListsArgument,
                                      TokenListsArgument, int32_t>;

PrefixPlan to_prefix_plan(const PrefixPlanArgument& a) {
    const auto& [student, teacher, slot, events, student_lists, teacher_lists, most] = a;
    return {{to_prefix_side(student), to_prefix_side(teacher)},
            device_address<const int32_t>(slot),
            events,
            to_token_lists(student_lists),
            to_token_lists(teacher_lists),
            most};
}

PYBIND11_MODULE(XTOKEN_CUDA_MODULE, m) {
    m.doc() = "The CUDA kernels of xtoken; use the losses of the package xtoken instead.";
    register_error_translator();
    m.attr("max_threads") = max_threads;
    m.attr("cuda_version") = CUDART_VERSION;
#ifdef XTOKEN_CUDA_ARCHITECTURES
    m.attr("architectures") = XTOKEN_CUDA_ARCHITECTURES;
#endif

    m.def(
        "pkl_workspace",
        [](const PlanArgument& plan, const std::string& merge) {
            return pkl_workspace(to_plan(plan), to_cuda_merge(merge));
        },
        py::arg("plan"), py::arg("merge"), "Floats of workspace that a block of pkl needs.");
    m.def(
        "pkl",
        [](const PlanArgument& plan, const CudaLogits& student, const CudaLogits& teacher, const CudaLogits& grad,
           const CudaRows& student_rows, const CudaRows& teacher_rows, int64_t chunks, uintptr_t scale,
           uintptr_t losses, uintptr_t weight_sums, const CudaLabels& labels, double temperature,
           const std::string& merge, bool reverse, double lowest, double epsilon, uintptr_t workspace,
           const CudaLaunch& launch) {
            pkl({to_cuda_logits(student), to_cuda_logits(teacher), to_cuda_logits(grad), to_cuda_rows(student_rows),
                 to_cuda_rows(teacher_rows), chunks, device_address<const float>(scale), device_address<float>(losses),
                 static_cast<float>(temperature), to_cuda_merge(merge), reverse, static_cast<float>(lowest),
                 static_cast<float>(epsilon), to_cuda_labels(labels), device_address<float>(weight_sums),
                 device_address<float>(workspace), to_plan(plan)},
                to_cuda_launch(launch));
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"),
        py::arg("teacher_rows"), py::arg("chunks"), py::arg("scale"), py::arg("losses"), py::arg("weight_sums"),
        py::arg("labels"), py::arg("temperature"), py::arg("merge"), py::arg("reverse"), py::arg("lowest"),
        py::arg("epsilon"), py::arg("workspace"), py::arg("launch"), Free());
    m.def(
        "row_weights",
        [](uintptr_t row_ptr, uintptr_t col, uintptr_t weight, uintptr_t place, int32_t rows, uintptr_t out,
           const CudaLaunch& launch) {
            row_weights(device_address<const int64_t>(row_ptr), device_address<const int32_t>(col),
                        device_address<const float>(weight), device_address<const int32_t>(place), rows,
                        device_address<float>(out), to_cuda_launch(launch));
        },
        py::arg("row_ptr"), py::arg("col"), py::arg("weight"), py::arg("place"), py::arg("rows"), py::arg("out"),
        py::arg("launch"), Free());
    m.def(
        "sum_blocks",
        [](uintptr_t sums, int32_t blocks, int64_t entries, uintptr_t out, const CudaLaunch& launch) {
            sum_blocks(device_address<const float>(sums), blocks, entries, device_address<float>(out),
                       to_cuda_launch(launch));
        },
        py::arg("sums"), py::arg("blocks"), py::arg("entries"), py::arg("out"), py::arg("launch"), Free());
    m.def(
        "cross_entropy",
        [](const CudaLogits& student, const CudaLogits& grad, const CudaLabels& labels, double lowest, bool add,
           uintptr_t factor, uintptr_t skip, const CudaLaunch& launch) {
            cross_entropy(
                {to_cuda_logits(student), to_cuda_logits(grad), to_cuda_labels(labels), static_cast<float>(lowest), add,
                 device_address<const float>(factor), device_address<const uint8_t>(skip)},
                to_cuda_launch(launch));
        },
        py::arg("student"), py::arg("grad"), py::arg("labels"), py::arg("lowest"), py::arg("add"), py::arg("factor"),
        py::arg("skip"), py::arg("launch"), Free());
    m.def(
        "mark_rows",
        [](uintptr_t start, uintptr_t count, int64_t chunks, uintptr_t covered, const CudaLaunch& launch) {
            mark_rows(device_address<const int64_t>(start), device_address<const int64_t>(count), chunks,
                      device_address<uint8_t>(covered), to_cuda_launch(launch));
        },
        py::arg("start"), py::arg("count"), py::arg("chunks"), py::arg("covered"), py::arg("launch"), Free());
    m.def(
        "kd",
        [](const CudaLogits& student, const CudaLogits& teacher, const CudaLogits& grad, uintptr_t student_rows,
           uintptr_t teacher_rows, int64_t chunks, uintptr_t chosen, uintptr_t place, int32_t columns, uintptr_t scale,
           uintptr_t losses, const CudaLabels& labels, double temperature, bool reverse, double lowest,
           const CudaLaunch& launch) {
            kd({to_cuda_logits(student), to_cuda_logits(teacher), to_cuda_logits(grad),
                device_address<const int64_t>(student_rows), device_address<const int64_t>(teacher_rows), chunks,
                device_address<const int32_t>(chosen), device_address<const int32_t>(place), columns,
                device_address<const float>(scale), device_address<float>(losses), static_cast<float>(temperature),
                reverse, static_cast<float>(lowest), to_cuda_labels(labels)},
               to_cuda_launch(launch));
        },
        py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"), py::arg("teacher_rows"),
        py::arg("chunks"), py::arg("chosen"), py::arg("place"), py::arg("columns"), py::arg("scale"), py::arg("losses"),
        py::arg("labels"), py::arg("temperature"), py::arg("reverse"), py::arg("lowest"), py::arg("launch"), Free());
    m.def(
        "prefix_workspace", [](const PrefixPlanArgument& plan) { return prefix_workspace(to_prefix_plan(plan)); },
        py::arg("plan"), "Floats of workspace that a block of prefix needs.");
    m.def(
        "prefix",
        [](const PrefixPlanArgument& plan, const CudaLogits& student, const CudaLogits& teacher, const CudaLogits& grad,
           const CudaRows& student_rows, const CudaRows& teacher_rows, int64_t chunks, uintptr_t scale,
           uintptr_t losses, const CudaLabels& labels, double temperature, bool reverse, double lowest,
           uintptr_t workspace, const CudaLaunch& launch) {
            prefix({to_cuda_logits(student), to_cuda_logits(teacher), to_cuda_logits(grad), to_cuda_rows(student_rows),
                    to_cuda_rows(teacher_rows), chunks, device_address<const float>(scale),
                    device_address<float>(losses), static_cast<float>(temperature), reverse, static_cast<float>(lowest),
                    to_cuda_labels(labels), device_address<float>(workspace), to_prefix_plan(plan)},
                   to_cuda_launch(launch));
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"),
        py::arg("teacher_rows"), py::arg("chunks"), py::arg("scale"), py::arg("losses"), py::arg("labels"),
        py::arg("temperature"), py::arg("reverse"), py::arg("lowest"), py::arg("workspace"), py::arg("launch"), Free());
    m.def(
        "scale",
        [](uintptr_t data, const std::string& element, int64_t size, uintptr_t factor, const CudaLaunch& launch) {
            scale(device_address<void>(data), to_cuda_element(element), size, device_address<const float>(factor),
                  to_cuda_launch(launch));
        },
        py::arg("data"), py::arg("element"), py::arg("size"), py::arg("factor"), py::arg("launch"), Free());
    m.def("gold_workspace", &gold_workspace, py::arg("students"), py::arg("teachers"),
          "Floats of workspace that a block of gold_forward and gold_backward needs.");
    m.def(
        "gold_forward",
        [](const GoldPlanArgument& plan, const CudaLogits& student, const CudaLogits& teacher,
           const CudaRows& student_rows, const CudaRows& teacher_rows, int64_t chunks, double temperature, bool reverse,
           double lowest, uintptr_t workspace, uintptr_t common, uintptr_t student_values, uintptr_t teacher_values,
           const CudaLaunch& launch) {
            GoldParams params{};
            params.student = to_cuda_logits(student);
            params.teacher = to_cuda_logits(teacher);
            params.student_rows = to_cuda_rows(student_rows);
            params.teacher_rows = to_cuda_rows(teacher_rows);
            params.chunks = chunks;
            params.temperature = static_cast<float>(temperature);
            params.reverse = reverse;
            params.lowest = static_cast<float>(lowest);
            params.workspace = device_address<float>(workspace);
            params.plan = to_gold_plan(plan);
            params.common = device_address<float>(common);
            params.student_values = device_address<float>(student_values);
            params.teacher_values = device_address<float>(teacher_values);
            gold_forward(params, to_cuda_launch(launch));
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("student_rows"), py::arg("teacher_rows"),
        py::arg("chunks"), py::arg("temperature"), py::arg("reverse"), py::arg("lowest"), py::arg("workspace"),
        py::arg("common"), py::arg("student_values"), py::arg("teacher_values"), py::arg("launch"), Free());
    m.def(
        "gold_backward",
        [](const GoldPlanArgument& plan, const CudaLogits& student, const CudaLogits& teacher, const CudaLogits& grad,
           const CudaRows& student_rows, const CudaRows& teacher_rows, int64_t chunks, uintptr_t scale,
           const CudaLabels& labels, double temperature, bool reverse, double lowest, uintptr_t workspace,
           uintptr_t slope, const CudaLaunch& launch) {
            GoldParams params{};
            params.student = to_cuda_logits(student);
            params.teacher = to_cuda_logits(teacher);
            params.grad = to_cuda_logits(grad);
            params.student_rows = to_cuda_rows(student_rows);
            params.teacher_rows = to_cuda_rows(teacher_rows);
            params.chunks = chunks;
            params.scale = device_address<const float>(scale);
            params.temperature = static_cast<float>(temperature);
            params.reverse = reverse;
            params.lowest = static_cast<float>(lowest);
            params.workspace = device_address<float>(workspace);
            params.plan = to_gold_plan(plan);
            params.slope = device_address<const float>(slope);
            params.labels = to_cuda_labels(labels);
            gold_backward(params, to_cuda_launch(launch));
        },
        py::arg("plan"), py::arg("student"), py::arg("teacher"), py::arg("grad"), py::arg("student_rows"),
        py::arg("teacher_rows"), py::arg("chunks"), py::arg("scale"), py::arg("labels"), py::arg("temperature"),
        py::arg("reverse"), py::arg("lowest"), py::arg("workspace"), py::arg("slope"), py::arg("launch"), Free());
}

}  // namespace
}  // namespace xtoken
