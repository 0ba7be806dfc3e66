// The vector functions of simd.h on arrays, so that tests can compare every level with exact values.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/element.h"

namespace xtoken::cpu {

// result[i] = exp(x[i] / temperature) in units of exp(returned), with `centre` as in Exponential::around.
XTOKEN_KERNEL(double, exp_array, (const float* x, int64_t count, float centre, double temperature, float* result))

// result[i] = log(x[i]).
XTOKEN_KERNEL(void, log_array, (const float* x, int64_t count, float* result))

// Conversions as rows are read and written.
XTOKEN_KERNEL(void, to_float, (const void* x, Element type, int64_t count, float* result))
XTOKEN_KERNEL(void, from_float, (const float* x, Element type, int64_t count, void* result))

}  // namespace xtoken::cpu
