// Vectors of 16 floats as plain arrays, for any processor; see simd.h.
#pragma once

namespace xtoken::cpu::XTOKEN_LEVEL {

struct Floats {
    float v[16];
};

struct Mask {
    bool v[16];
};

inline uint32_t float_bits(float x) {
    uint32_t result;
    memcpy(&result, &x, sizeof(result));
    return result;
}
inline float float_of(uint32_t x) {
    float result;
    memcpy(&result, &x, sizeof(result));
    return result;
}

template <typename Function>
inline Floats each(Function value) {
    Floats result;
    for (int i = 0; i < 16; ++i) result.v[i] = value(i);
    return result;
}

inline Floats broadcast(float x) {
    return each([=](int) { return x; });
}
inline Floats operator+(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats reciprocal(Floats x) { return broadcast(1.0f) / x; }
#ifdef __FP_FAST_FMAF
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
#else
// In double the product is exact.
inline float fused(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }
#endif
inline Floats fma(Floats a, Floats b, Floats c) {
    return each([&](int i) { return fused(a.v[i], b.v[i], c.v[i]); });
}
inline Floats fnma(Floats a, Floats b, Floats c) {
    return each([&](int i) { return fused(-a.v[i], b.v[i], c.v[i]); });
}
inline Floats max(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats min(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}

inline Mask first(int64_t n) {
    Mask m;
    for (int i = 0; i < 16; ++i) m.v[i] = i < n;
    return m;
}
inline Mask greater(Floats a, Floats b) {
    Mask m;
    for (int i = 0; i < 16; ++i) m.v[i] = a.v[i] > b.v[i];
    return m;
}
inline Mask equal(Floats a, Floats b) {
    Mask m;
    for (int i = 0; i < 16; ++i) m.v[i] = a.v[i] == b.v[i];
    return m;
}
inline uint32_t bits(Mask m) {
    uint32_t result = 0;
    for (int i = 0; i < 16; ++i) result |= static_cast<uint32_t>(m.v[i]) << i;
    return result;
}
inline Mask from_bits(uint32_t lanes_set) {
    Mask m;
    for (int i = 0; i < 16; ++i) m.v[i] = (lanes_set >> i & 1u) != 0;
    return m;
}
inline Floats select(Mask m, Floats yes, Floats no) {
    return each([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}

inline float half_to_float(Float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 0x1Fu, fraction = x.bits & 0x3FFu;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const float magnitude = static_cast<float>(fraction) * float_of(0x33800000u);
        return float_of(sign | float_bits(magnitude));
    }
    if (exponent == 31) return float_of(sign | 0x7F800000u | fraction << 13);
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}
inline Float16 half_of(float x) {
    const uint32_t sign = float_bits(x) >> 16 & 0x8000u;
    const uint32_t magnitude = float_bits(x) & 0x7FFFFFFFu;
    uint32_t result;
    if (magnitude > 0x7F800000u) {
        result = 0x7E00u;  // NaN
    } else if (magnitude < 0x38800000u) {
        // subnormal result: adding 0.5 puts the rounded multiple of 2^-24 into the low bits
        result = float_bits(float_of(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
        result = rounded >= 0x47800000u ? 0x7C00u : (rounded - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(sign | result)};
}
inline BFloat16 bfloat16_of(float x) {
    const uint32_t wide = float_bits(x);
    if (x != x) return {0x7FC0u};
    return {static_cast<uint16_t>((wide + 0x7FFFu + (wide >> 16 & 1u)) >> 16)};
}

inline Floats load(const float* p) {
    return each([=](int i) { return p[i]; });
}
inline Floats load(const BFloat16* p) {
    return each([=](int i) { return float_of(static_cast<uint32_t>(p[i].bits) << 16); });
}
inline Floats load(const Float16* p) {
    return each([=](int i) { return half_to_float(p[i]); });
}
inline void store(float* p, Floats x) {
    for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
inline void store(BFloat16* p, Floats x) {
    for (int i = 0; i < 16; ++i) p[i] = bfloat16_of(x.v[i]);
}
inline void store(Float16* p, Floats x) {
    for (int i = 0; i < 16; ++i) p[i] = half_of(x.v[i]);
}
template <typename T>
inline void stream(T* p, Floats x) {
    store(p, x);
}
inline void stream_line(void* to, const void* from) { memcpy(to, from, 64); }
inline void fence() {}
inline void prefetch(const void*) {}

inline Floats gather(const float* base, const int32_t* index) {
    return each([=](int i) { return base[index[i]]; });
}

inline int64_t compress(float* p, Mask m, Floats x) {
    int64_t count = 0;
    for (int i = 0; i < 16; ++i) {
        if (m.v[i]) p[count++] = x.v[i];
    }
    return count;
}
constexpr bool expand_is_quick = false;
inline Floats expand(const float* p, Mask m) {
    return each([&](int i) { return m.v[i] ? *p++ : 0.0f; });
}

inline Floats scale_by_power(Floats x, Floats n) {
    return each([&](int i) {
        const float power = n.v[i] > -127.0f ? (n.v[i] < 128.0f ? n.v[i] : 128.0f) : -127.0f;
        return x.v[i] * float_of(static_cast<uint32_t>(static_cast<int32_t>(power) + 127) << 23);
    });
}

inline Floats split(Floats x, Floats* exponent) {
    return each([&](int i) {
        // Subtracting the bits of 0.75 carries into the exponent exactly where the mantissa is below 1.5.
        const int32_t power = static_cast<int32_t>(float_bits(x.v[i]) - 0x3F400000u) >> 23;
        exponent->v[i] = static_cast<float>(power);
        return float_of(float_bits(x.v[i]) - (static_cast<uint32_t>(power) << 23));
    });
}

inline void add_to_doubles(double* lane, Floats x) {
    for (int i = 0; i < 16; ++i) lane[i] += x.v[i];
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
