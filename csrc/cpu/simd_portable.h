// Vectors of 16 floats as four of the compiler's own, for any processor; see simd.h.
#pragma once

namespace xtoken::cpu::XTOKEN_LEVEL {

using Floats4 = float __attribute__((vector_size(16)));
using Bits4 = uint32_t __attribute__((vector_size(16)));
using Mask4 = int32_t __attribute__((vector_size(16)));  // -1 where it is set
using Halves4 = uint16_t __attribute__((vector_size(8)));
using Doubles4 = double __attribute__((vector_size(32)));

template <typename V>
struct Four {
    V a, b, c, d;
};
using Floats = Four<Floats4>;
using Mask = Four<Mask4>;

// What `of` makes of each quarter.
template <typename Function, typename... V>
inline auto quarters(Function of, Four<V>... x) -> Four<decltype(of(x.a...))> {
    return {of(x.a...), of(x.b...), of(x.c...), of(x.d...)};
}
template <typename V, typename T>
inline V read(const T* p) {
    V result;
    memcpy(&result, p, sizeof(result));
    return result;
}
template <typename V, typename T>
inline Four<V> read_four(const T* p) {
    return {read<V>(p), read<V>(p + 4), read<V>(p + 8), read<V>(p + 12)};
}
template <typename V, typename T>
inline void write(T* p, Four<V> x) {
    memcpy(p, &x, sizeof(x));
}

inline Floats broadcast(float x) {
    const Floats4 part = {x, x, x, x};
    return {part, part, part, part};
}
inline Floats operator+(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a + b; }, x, y);
}
inline Floats operator-(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a - b; }, x, y);
}
inline Floats operator*(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a * b; }, x, y);
}
inline Floats operator/(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a / b; }, x, y);
}
inline Floats reciprocal(Floats x) { return broadcast(1.0f) / x; }
inline Floats4 fused(Floats4 a, Floats4 b, Floats4 c) {
#ifdef __FP_FAST_FMAF
    for (int i = 0; i < 4; ++i) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#else
    // In double the product is exact.
    return __builtin_convertvector(__builtin_convertvector(a, Doubles4) * __builtin_convertvector(b, Doubles4) +
                                       __builtin_convertvector(c, Doubles4),
                                   Floats4);
#endif
}
inline Floats fma(Floats x, Floats y, Floats z) { return quarters(fused, x, y, z); }
inline Floats fnma(Floats x, Floats y, Floats z) {
    return quarters([](Floats4 a, Floats4 b, Floats4 c) { return fused(-a, b, c); }, x, y, z);
}
inline Floats max(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a > b ? a : b; }, x, y);
}
inline Floats min(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a < b ? a : b; }, x, y);
}

inline Mask greater(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a > b; }, x, y);
}
inline Mask equal(Floats x, Floats y) {
    return quarters([](Floats4 a, Floats4 b) { return a == b; }, x, y);
}
inline Floats select(Mask m, Floats yes, Floats no) {
    return quarters([](Mask4 a, Floats4 b, Floats4 c) { return a ? b : c; }, m, yes, no);
}
inline uint32_t bits(Mask m) {
    const Mask4 set = (m.a & Mask4{1, 2, 4, 8}) | (m.b & Mask4{16, 32, 64, 128}) | (m.c & Mask4{256, 512, 1024, 2048}) |
                      (m.d & Mask4{4096, 8192, 16384, 32768});
    return static_cast<uint32_t>(set[0] | set[1] | set[2] | set[3]);
}
inline Mask from_bits(uint32_t lanes_set) {
    const auto set = static_cast<int32_t>(lanes_set);
    return {(set & Mask4{1, 2, 4, 8}) != 0, (set & Mask4{16, 32, 64, 128}) != 0,
            (set & Mask4{256, 512, 1024, 2048}) != 0, (set & Mask4{4096, 8192, 16384, 32768}) != 0};
}
inline Mask first(int64_t n) { return from_bits(n >= 16 ? 0xFFFFu : (1u << n) - 1u); }

inline Bits4 bits_of(Floats4 x) { return reinterpret_cast<Bits4>(x); }
inline Floats4 floats_of(Bits4 x) { return reinterpret_cast<Floats4>(x); }
inline Floats4 to_floats(Mask4 x) { return __builtin_convertvector(x, Floats4); }

inline Floats4 float16_value(Halves4 half) {
    const Bits4 x = __builtin_convertvector(half, Bits4);
    const Bits4 sign = (x & 0x8000u) << 16, exponent = x >> 10 & 0x1Fu, fraction = x & 0x3FFu;
    // a subnormal is fraction * 2^-24
    const Bits4 small = bits_of(to_floats(reinterpret_cast<Mask4>(fraction)) * floats_of(Bits4{} + 0x33800000u));
    const Bits4 number = exponent == 31 ? 0x7F800000u | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    return floats_of(sign | (exponent == 0 ? small : number));
}
inline Bits4 float16_bits(Floats4 x) {
    const Bits4 sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7FFFFFFFu;
    const Bits4 rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u), infinity = Bits4{} + 0x7C00u;
    Bits4 result = rounded >= 0x47800000u ? infinity : (rounded - 0x38000000u) >> 13;
    // subnormal result: adding 0.5 puts the rounded multiple of 2^-24 into the low bits
    result = magnitude < 0x38800000u ? bits_of(floats_of(magnitude) + 0.5f) - 0x3F000000u : result;
    result = magnitude > 0x7F800000u ? infinity | 0x200u : result;  // NaN
    return sign | result;
}
inline Bits4 bfloat16_bits(Floats4 x) {
    const Bits4 wide = bits_of(x);
    return x != x ? Bits4{} + 0x7FC0u : (wide + 0x7FFFu + (wide >> 16 & 1u)) >> 16;
}
template <typename T>
inline void store_halves(T* p, Four<Bits4> x) {
    uint32_t lane[16];
    write(lane, x);
    for (int i = 0; i < 16; ++i) p[i].bits = static_cast<uint16_t>(lane[i]);
}

inline Floats load(const float* p) { return read_four<Floats4>(p); }
inline Floats load(const BFloat16* p) {
    return quarters([](Halves4 x) { return floats_of(__builtin_convertvector(x, Bits4) << 16); },
                    read_four<Halves4>(p));
}
inline Floats load(const Float16* p) { return quarters(float16_value, read_four<Halves4>(p)); }
inline void store(float* p, Floats x) { write(p, x); }
inline void store(BFloat16* p, Floats x) { store_halves(p, quarters(bfloat16_bits, x)); }
inline void store(Float16* p, Floats x) { store_halves(p, quarters(float16_bits, x)); }
template <typename T>
inline void stream(T* p, Floats x) {
    store(p, x);
}
inline void stream_line(void* to, const void* from) { memcpy(to, from, 64); }
inline void fence() {}
inline void prefetch(const void*) {}

inline Floats gather(const float* base, const int32_t* index) {
    return quarters([=](Mask4 i) { return Floats4{base[i[0]], base[i[1]], base[i[2]], base[i[3]]}; },
                    read_four<Mask4>(index));
}

inline int64_t compress(float* p, Mask m, Floats x) {
    float lane[16];
    store(lane, x);
    int64_t count = 0;
    for (uint32_t set = bits(m); set != 0; set &= set - 1) p[count++] = lane[__builtin_ctz(set)];
    return count;
}
constexpr bool expand_is_quick = false;
inline Floats expand(const float* p, Mask m) {
    float lane[16] = {};
    for (uint32_t set = bits(m); set != 0; set &= set - 1) lane[__builtin_ctz(set)] = *p++;
    return load(lane);
}

inline Floats scale_by_power(Floats x, Floats n) {
    const Floats power = max(min(n, broadcast(128.0f)), broadcast(-127.0f));
    return x * quarters(
                   [](Floats4 a) {
                       return floats_of(reinterpret_cast<Bits4>(__builtin_convertvector(a, Mask4) + 127) << 23);
                   },
                   power);
}

inline Floats split(Floats x, Floats* exponent) {
    // Subtracting the bits of 0.75 carries into the exponent exactly where the mantissa is below 1.5.
    const Mask power = quarters([](Floats4 a) { return reinterpret_cast<Mask4>(bits_of(a) - 0x3F400000u) >> 23; }, x);
    *exponent = quarters(to_floats, power);
    return quarters([](Floats4 a, Mask4 n) { return floats_of(bits_of(a) - (reinterpret_cast<Bits4>(n) << 23)); }, x,
                    power);
}

inline void add_to_doubles(double* lane, Floats x) {
    const Four<Doubles4> sums =
        quarters([](Doubles4 sum, Floats4 a) { return sum + __builtin_convertvector(a, Doubles4); },
                 read_four<Doubles4>(lane), x);
    write(lane, sums);
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
