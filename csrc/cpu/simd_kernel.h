// The vector functions of simd.h on arrays, so that tests can compare every level with exact values.
#pragma once

#include "cpu/dispatch.h"
#include "launch/arguments.h"

namespace xtoken::cpu {

struct ExpParams {
#define XTOKEN_EXP(FIELD)                                                         \
    FIELD(Values<float>, x, "[n]");                                               \
    FIELD(float, centre, "as in Exponential::around");                            \
    FIELD(double, temperature, "what x is divided by");                           \
    FIELD(bool, rough, "as for logits of 16 bits");                               \
    FIELD(float*, result, "[n] out: exp(x / temperature) in units of exp(unit)"); \
    FIELD(double*, unit, "[] out")
    XTOKEN_FIELDS(XTOKEN_EXP)
};
XTOKEN_KERNEL(void, exp_array, (const ExpParams& params))

struct LogParams {
#define XTOKEN_LOG(FIELD)           \
    FIELD(Values<float>, x, "[n]"); \
    FIELD(float*, result, "[n] out: log(x)")
    XTOKEN_FIELDS(XTOKEN_LOG)
};
XTOKEN_KERNEL(void, log_array, (const LogParams& params))

// Conversions as rows are read and written.
struct ToFloatParams {
#define XTOKEN_TO_FLOAT(FIELD)            \
    FIELD(const void*, x, "[n] of type"); \
    FIELD(Element, type, "of x");         \
    FIELD(int64_t, count, "n");           \
    FIELD(float*, result, "[n] out")
    XTOKEN_FIELDS(XTOKEN_TO_FLOAT)
};
XTOKEN_KERNEL(void, to_float, (const ToFloatParams& params))

struct FromFloatParams {
#define XTOKEN_FROM_FLOAT(FIELD)       \
    FIELD(Values<float>, x, "[n]");    \
    FIELD(Element, type, "of result"); \
    FIELD(void*, result, "[n] of type, out")
    XTOKEN_FIELDS(XTOKEN_FROM_FLOAT)
};
XTOKEN_KERNEL(void, from_float, (const FromFloatParams& params))

}  // namespace xtoken::cpu
