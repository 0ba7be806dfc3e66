// The vector functions of simd.h on arrays, so that tests can compare every level with exact values.
#include "cpu/simd_kernel.h"

#include "cpu/rows.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

template <typename From, typename To>
void convert(const From* x, int64_t count, To* result) {
    for (int64_t i = 0; i < count; i += lanes) {
        store(result + i, count - i, load(x + i, count - i, broadcast(0.0f)));
    }
}

}  // namespace

void exp_array(const ExpParams& params) {
    const Exponential exp = Exponential::around(params.centre, -1e4f, params.temperature);
    const auto [x, count] = params.x;
    for (int64_t i = 0; i < count; i += lanes) {
        const Floats relative = exp.relative(load(x + i, count - i, broadcast(0.0f)));
        store(params.result + i, count - i, params.rough ? exp.rough(relative) : exp.of_relative(relative));
    }
    *params.unit = exp.log_unit();
}

void log_array(const LogParams& params) {
    const auto [x, count] = params.x;
    for (int64_t i = 0; i < count; i += lanes) {
        store(params.result + i, count - i, log(load(x + i, count - i, broadcast(1.0f))));
    }
}

void to_float(const ToFloatParams& params) {
    typed(params.type, params.x, [&](const auto* x) { convert(x, params.count, params.result); });
}

void from_float(const FromFloatParams& params) {
    const auto [x, count] = params.x;
    typed(params.type, params.result, [&, x = x, count = count](const auto* type) {
        using T = typename Element_of<decltype(*type)>::type;
        convert(x, count, static_cast<T*>(params.result));
    });
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
