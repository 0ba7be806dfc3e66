// Arguments of the CUDA kernels as Python hands them over: addresses of device memory, sizes and strides.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "core/error.h"
#include "cuda/arguments.h"

namespace xtoken {

template <typename T>
T* device_address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

inline cuda::Element to_cuda_element(const std::string& name) {
    if (name == "float32") return cuda::Element::float32;
    if (name == "bfloat16") return cuda::Element::bfloat16;
    if (name == "float16") return cuda::Element::float16;
    value_error("element: expected 'float32', 'bfloat16' or 'float16', got '", name, "'");
}

// (address, element, samples, length, width, sample stride, row stride)
using CudaLogits = std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t, int64_t, int64_t>;

inline cuda::Logits to_cuda_logits(const CudaLogits& a) {
    const auto [address, element, samples, length, width, sample_stride, row_stride] = a;
    if (width > INT32_MAX) value_error("logits: expected at most ", INT32_MAX, " columns, got ", width);
    return {device_address<void>(address), to_cuda_element(element), samples,   length,
            static_cast<int32_t>(width),   sample_stride,            row_stride};
}

// (start, count, next)
using CudaRows = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

inline cuda::ChunkRows to_cuda_rows(const CudaRows& a) {
    return {device_address<const int64_t>(std::get<0>(a)), device_address<const int64_t>(std::get<1>(a)),
            device_address<const int64_t>(std::get<2>(a))};
}

// (ids, scale, losses)
using CudaLabels = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

inline cuda::Labels to_cuda_labels(const CudaLabels& a) {
    return {device_address<const int64_t>(std::get<0>(a)), device_address<const double>(std::get<1>(a)),
            device_address<float>(std::get<2>(a))};
}

// (blocks, threads, stream)
using CudaLaunch = std::tuple<int32_t, int32_t, uintptr_t>;

inline cuda::Launch to_cuda_launch(const CudaLaunch& a) {
    return {std::get<0>(a), std::get<1>(a), device_address<void>(std::get<2>(a))};
}

}  // namespace xtoken
