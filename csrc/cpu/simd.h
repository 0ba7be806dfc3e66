// Vectors of 16 floats for the kernels, in three versions: AVX-512, AVX2 with FMA and F16C, and the compiler's own
// vectors.
//
// A file X_kernel.cpp includes this header and is compiled once per level (CMakeLists.txt: xtoken_cpu_kernels), with
// XTOKEN_LEVEL the level's name and namespace. Everything in it, helpers and templates included, must be inside
// namespace xtoken::cpu::XTOKEN_LEVEL, and it must not use templates or inline functions of the standard library: the
// linker keeps one copy of such a function for all files, perhaps the one compiled for a newer processor.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/element.h"
#include "cpu/lanes.h"

#ifndef XTOKEN_LEVEL
#error "kernels are compiled per level, see CMakeLists.txt"
#endif
#if defined(XTOKEN_LEVEL_AVX512)
#include "cpu/simd_avx512.h"
#elif defined(XTOKEN_LEVEL_AVX2)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_portable.h"
#endif

namespace xtoken::cpu::XTOKEN_LEVEL {

inline Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
inline Floats& operator*=(Floats& a, Floats b) { return a = a * b; }

// The first n elements, 0 <= n <= 16; the other lanes hold `fill`. Touches no memory beyond them.
template <typename T>
inline Floats load(const T* p, int64_t n, Floats fill) {
    if (n >= lanes) return load(p);
    alignas(64) T part[lanes] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return select(first(n), load(part), fill);
}

template <typename T>
inline void store(T* p, int64_t n, Floats x) {
    if (n >= lanes) return store(p, x);
    alignas(64) T part[lanes];
    store(part, x);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// Elements of half the size are picked one by one: a vector gather would read beyond the row's last element.
template <typename T>
inline Floats gather(const T* base, const int32_t* index) {
    alignas(64) T part[lanes];
    for (int64_t i = 0; i < lanes; ++i) part[i] = base[index[i]];
    return load(part);
}

inline float widened(float x) { return x; }
inline float widened(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float widened(Float16 x) {
    alignas(64) Float16 part[lanes] = {x};
    alignas(64) float value[lanes];
    store(value, load(part));
    return value[0];
}

template <typename T>
inline T narrowed(float x) {
    alignas(64) T part[lanes];
    store(part, broadcast(x));
    return part[0];
}

// Adds floats in double, lane by lane, in an order that depends on the number of calls only.
class DoubleSum {
  public:
    void add(Floats x) { add_to_doubles(lane_, x); }
    double total() const {
        double half[lanes];
        for (int i = 0; i < lanes; ++i) half[i] = lane_[i];
        for (int width = lanes / 2; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) half[i] += half[i + width];
        }
        return half[0];
    }

  private:
    alignas(64) double lane_[lanes] = {};
};

inline float sum(Floats x) {
    DoubleSum total;
    total.add(x);
    return static_cast<float>(total.total());
}

inline float largest(Floats x) {
    alignas(64) float lane[lanes];
    store(lane, x);
    float top = lane[0];
    for (int i = 1; i < lanes; ++i) top = lane[i] > top || lane[i] != lane[i] ? lane[i] : top;
    return top;
}

// exp((x - centre) / temperature), for x of at least `lowest`; smaller ones are raised to it.
//
// With n = round((x - centre) log2(e) / temperature), exp = 2^n polynomial(r), r = n - (x - centre) log2(e) /
// temperature in [-0.5, 0.5]. log2(e) / temperature is two floats, so r is exact to a float's rounding. n comes from
// adding 1.5 * 2^23, which rounds to an integer. Relative error below 1e-7 beyond the rounding of x - centre; exactly 1
// at the centre.
class Exponential {
  public:
    // `centre` is near the largest x: results stay finite up to 60 temperatures above it; 200 below it they are zero.
    static Exponential around(float centre, float lowest, double temperature) {
        Exponential e;
        e.floor_ = static_cast<float>(-200 * temperature);
        e.raises_ = lowest - centre > e.floor_;
        if (e.raises_) e.floor_ = lowest - centre;
        e.centre_ = centre;
        e.slope_ = static_cast<float>(1.4426950408889634 / temperature);
        e.slope_low_ = static_cast<float>(1.4426950408889634 / temperature - static_cast<double>(e.slope_));
        e.log_unit_ = static_cast<double>(centre) / temperature;
        return e;
    }

    // max(x, lowest) - centre, but not below what makes the exponential zero. The difference is compared, not x: that
    // and the centre may be floats too large to differ by so little.
    Floats relative(Floats x) const { return max(broadcast(floor_), x - broadcast(centre_)); }

    Floats operator()(Floats x) const { return of_relative(relative(x)); }

    Floats of_relative(Floats x) const {
        const Floats magic = broadcast(12582912.0f);
        const Floats n = fma(x, broadcast(slope_), magic) - magic;
        const Floats r = fnma(x, broadcast(slope_low_), fnma(x, broadcast(slope_), n));  // n - x log2(e) / temperature
        Floats y = fma(broadcast(1.5327840811e-04f), r, broadcast(-1.3390997192e-03f));
        y = fma(y, r, broadcast(9.6185030416e-03f));
        y = fma(y, r, broadcast(-5.5503595620e-02f));
        y = fma(y, r, broadcast(2.4022647738e-01f));
        y = fma(y, r, broadcast(-6.9314718246e-01f));
        y = fma(y, r, broadcast(1.0f));
        return scale_by_power(y, n);
    }

    // The same, but for AVX-512 faster and with a relative error below 2e-7 + 2^-23 |x| / temperature; exactly 1 at the
    // centre.
    Floats rough(Floats x) const {
#if defined(XTOKEN_LEVEL_AVX512)
        return rough_power(x, broadcast(slope_));
#else
        return of_relative(x);
#endif
    }

    // Whether the exponential of the lowest is not zero.
    bool raises() const { return raises_; }

    // exp(x / temperature) = result * exp(log_unit()).
    double log_unit() const { return log_unit_; }

  private:
    float floor_, centre_, slope_, slope_low_;
    bool raises_;
    double log_unit_;
};

#if !defined(XTOKEN_LEVEL_AVX512)
// Natural logarithm of positive normal numbers; absolute error below 1e-7 max(1, |log x|). With x = 2^e m,
// m in [0.75, 1.5), f = m - 1: log x = e ln 2 + f - f^2 / 2 + f^3 polynomial(f).
inline Floats log(Floats x) {
    Floats e;
    const Floats f = split(x, &e) - broadcast(1.0f);
    Floats y = fma(broadcast(-0.0450744666f), f, broadcast(0.1046299562f));
    y = fma(y, f, broadcast(-0.1316119581f));
    y = fma(y, f, broadcast(0.1447840035f));
    y = fma(y, f, broadcast(-0.1664731205f));
    y = fma(y, f, broadcast(0.1999086142f));
    y = fma(y, f, broadcast(-0.2500009537f));
    y = fma(y, f, broadcast(0.3333345056f));
    const Floats square = f * f;
    y = fma(y, f, broadcast(-0.5f));
    y = fma(y, square, fma(e, broadcast(1.42860682e-6f), f));
    return fma(e, broadcast(0.693145751953125f), y);
}
#endif

}  // namespace xtoken::cpu::XTOKEN_LEVEL
