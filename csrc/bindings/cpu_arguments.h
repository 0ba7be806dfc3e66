// Arguments of the CPU kernels as Python hands them over: addresses, sizes and strides.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "core/error.h"
#include "cpu/logits.h"

namespace xtoken {

inline cpu::Element to_element(const std::string& name) {
    if (name == "float32") return cpu::Element::float32;
    if (name == "bfloat16") return cpu::Element::bfloat16;
    if (name == "float16") return cpu::Element::float16;
    value_error("element: expected 'float32', 'bfloat16' or 'float16', got '", name, "'");
}

template <typename T>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

// (address, element, samples, length, width, sample stride, row stride)
using LogitsArgument = std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t, int64_t, int64_t>;

inline cpu::Logits to_logits(const LogitsArgument& a) {
    return {address<void>(std::get<0>(a)),
            to_element(std::get<1>(a)),
            std::get<2>(a),
            std::get<3>(a),
            std::get<4>(a),
            std::get<5>(a),
            std::get<6>(a)};
}

// (start, count, next) addresses
using RowsArgument = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

inline cpu::ChunkRows to_rows(const RowsArgument& a) {
    return {address<const int64_t>(std::get<0>(a)), address<const int64_t>(std::get<1>(a)),
            address<const int64_t>(std::get<2>(a))};
}

// (ids, scale, losses)
using LabelsArgument = std::tuple<uintptr_t, double, uintptr_t>;

inline cpu::Labels to_labels(const LabelsArgument& a) {
    return {address<const int64_t>(std::get<0>(a)), std::get<1>(a), address<double>(std::get<2>(a))};
}

}  // namespace xtoken
