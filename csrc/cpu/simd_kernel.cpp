// The vector functions of simd.h on arrays, so that tests can compare every level with exact values.
#include "cpu/simd_kernel.h"

#include "cpu/simd.h"

namespace xtoken::cpu::XTOKEN_LEVEL {
namespace {

template <typename From, typename To>
void convert(const From* x, int64_t count, To* result) {
    for (int64_t i = 0; i < count; i += lanes) {
        store(result + i, count - i, load(x + i, count - i, broadcast(0.0f)));
    }
}

}  // namespace

double exp_array(const float* x, int64_t count, float centre, double temperature, float* result) {
    const Exponential exp = Exponential::around(centre, -1e4f, temperature);
    for (int64_t i = 0; i < count; i += lanes) {
        store(result + i, count - i, exp(load(x + i, count - i, broadcast(0.0f))));
    }
    return exp.log_unit();
}

void log_array(const float* x, int64_t count, float* result) {
    for (int64_t i = 0; i < count; i += lanes) {
        store(result + i, count - i, log(load(x + i, count - i, broadcast(1.0f))));
    }
}

void to_float(const void* x, Element type, int64_t count, float* result) {
    switch (type) {
        case Element::float32:
            return convert(static_cast<const float*>(x), count, result);
        case Element::bfloat16:
            return convert(static_cast<const BFloat16*>(x), count, result);
        case Element::float16:
            return convert(static_cast<const Float16*>(x), count, result);
    }
}

void from_float(const float* x, Element type, int64_t count, void* result) {
    switch (type) {
        case Element::float32:
            return convert(x, count, static_cast<float*>(result));
        case Element::bfloat16:
            return convert(x, count, static_cast<BFloat16*>(result));
        case Element::float16:
            return convert(x, count, static_cast<Float16*>(result));
    }
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
