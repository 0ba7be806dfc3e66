// Vectors of 16 floats in AVX-512 registers; see simd.h.
#pragma once

#include <immintrin.h>

namespace xtoken::cpu::XTOKEN_LEVEL {

struct Floats {
    __m512 v;
};

struct Mask {
    __mmask16 v;
};

inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// 1 / x of normal numbers below 2^126, to 1 or 2 units in the last place: a division takes twice as long.
inline Floats reciprocal(Floats x) {
    const __m512 rough = _mm512_rcp14_ps(x.v);
    const __m512 error = _mm512_fnmadd_ps(x.v, rough, _mm512_set1_ps(1.0f));
    return {_mm512_fmadd_ps(rough, error, rough)};
}
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
// a > b ? a : b, and a < b ? a : b: the second where one is NaN.
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }

inline Mask first(int64_t n) { return {static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1 << n) - 1)}; }
inline Mask greater(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask equal(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline uint32_t bits(Mask m) { return m.v; }
inline Mask from_bits(uint32_t lanes_set) { return {static_cast<__mmask16>(lanes_set)}; }
inline Floats select(Mask m, Floats yes, Floats no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
// Places for permutations of 16-bit elements: 0, 0, 0, 1, 0, 2 ...
struct WideningPlaces {
    alignas(64) uint16_t place[32] = {};
    constexpr WideningPlaces() {
        for (int i = 0; i < 16; ++i) place[2 * i + 1] = static_cast<uint16_t>(i);
    }
};
inline constexpr WideningPlaces widening_places;
inline Floats load(const BFloat16* p) {
    const __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i place = _mm512_load_si512(widening_places.place);
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, place, half))};
}
inline Floats load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// To nearest, ties to even.
inline __m256i bfloat16_bits(Floats x) {
    const __m512i wide = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store(BFloat16* p, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x)); }
inline void store(Float16* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
// Past the caches; p is a multiple of 16 elements' size. Ends with fence().
inline void stream(float* p, Floats x) { _mm512_stream_ps(p, x.v); }
inline void stream(BFloat16* p, Floats x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x)); }
inline void stream(Float16* p, Floats x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
// 64 bytes, likewise; `to` is a multiple of 64.
inline void stream_line(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
inline void fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Sixteen loads: on Zen 4 in 3.5 ns, where the gather instruction takes 6; and it is slow on every Intel processor with
// a correction for "Downfall". Places are loaded by two.
inline __attribute__((always_inline)) __m128 gather_quarter(const float* base, const int32_t* index) {
    uint64_t low, high;
    memcpy(&low, index, sizeof(low));
    memcpy(&high, index + 2, sizeof(high));
    __m128 x = _mm_load_ss(base + static_cast<uint32_t>(low));
    x = _mm_insert_ps(x, _mm_load_ss(base + (low >> 32)), 0x10);
    x = _mm_insert_ps(x, _mm_load_ss(base + static_cast<uint32_t>(high)), 0x20);
    return _mm_insert_ps(x, _mm_load_ss(base + (high >> 32)), 0x30);
}
inline __attribute__((always_inline)) Floats gather(const float* base, const int32_t* index) {
    const __m256 low = _mm256_set_m128(gather_quarter(base, index + 4), gather_quarter(base, index));
    const __m256 high = _mm256_set_m128(gather_quarter(base, index + 12), gather_quarter(base, index + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}

// Lanes of the mask to the front: writes 16 floats, of which the first (returned) count.
inline int64_t compress(float* p, Mask m, Floats x) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.v, x.v));
    return __builtin_popcount(m.v);
}
// The opposite: lane i of the mask gets the next of p's floats, other lanes 0. Reads 16 floats.
constexpr bool expand_is_quick = true;  // quicker than a branch that depends on the mask
inline Floats expand(const float* p, Mask m) { return {_mm512_maskz_expand_ps(m.v, _mm512_loadu_ps(p))}; }

// x 2^n for whole numbers n; 0 where that is too small.
inline Floats scale_by_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// Values at 1, 1 + 1/32, 1 + 2/32 ...
struct Table {
    alignas(64) float value[32];
    // The entries whose places are the lowest five bits of `place`.
    Floats operator[](__m512i place) const {
        return {_mm512_permutex2var_ps(_mm512_load_ps(value), place, _mm512_load_ps(value + 16))};
    }
};

// 2^(x slope) for |x slope| < 2^16, 0 where that is too small. Relative error below 2e-7 beyond the rounding of x
// slope; exactly 1 for x = 0. With n = x slope rounded to 32nds, r = n - x slope: 2^n (1 + r polynomial(r)).
inline constexpr Table powers = {{
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
}};
inline Floats rough_power(Floats x, Floats slope) {
    const Floats magic = broadcast(393216.0f);  // 1.5 * 2^18
    const Floats sum = fma(x, slope, magic), n = sum - magic, r = fnma(x, slope, n);
    const Floats power = powers[_mm512_castps_si512(sum.v)];
    const Floats y = fma(broadcast(0.24022885f), r, broadcast(-0.69315734f)) * r;
    return {_mm512_scalef_ps(fma(y, power, power).v, n.v)};  // by 2^floor(n)
}

// Natural logarithm of normal numbers from 2^-125 to 2^125; absolute error below 1e-7 max(1, |log x|). With y about
// 1 / x, of five bits after the point, and r = x y - 1: log x = r - r^2 / 2 + r^3 / 3 - log y.
inline constexpr Table logarithms = {{
    0.0f,          -0.0307716578f, -0.0606246218f, -0.0896121562f, -0.117783032f, -0.145182014f, -0.171850264f,
    -0.197825745f, -0.223143548f,  -0.247836158f,  -0.271933705f,  -0.295464218f, -0.318453729f, -0.340926588f,
    -0.362905502f, -0.384411693f,  -0.405465096f,  -0.426084399f,  -0.446287096f, -0.466089725f, -0.485507816f,
    -0.504556f,    -0.523248136f,  -0.541597307f,  -0.559615791f,  -0.57731539f,  -0.594707131f, -0.611801565f,
    -0.628608644f, -0.645137966f,  -0.66139847f,   -0.677398801f,
}};
inline Floats log(Floats x) {
    const __m512i rough = _mm512_castps_si512(_mm512_rcp14_ps(x.v));
    const __m512i bits = _mm512_add_epi32(rough, _mm512_set1_epi32(1 << 17));
    const Floats y = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFC0000u))))};
    const Floats r = {_mm512_fmsub_ps(x.v, y.v, _mm512_set1_ps(1.0f))};
    const Floats exponent = {_mm512_getexp_ps(y.v)};
    const Floats small = fma(fma(broadcast(0.333333333f), r, broadcast(-0.5f)), r * r, r);
    return fma(exponent, broadcast(-0.693147181f), small + logarithms[_mm512_srli_epi32(bits, 18)]);
}

inline void add_to_doubles(double* lane, Floats x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    _mm512_storeu_pd(lane, _mm512_add_pd(_mm512_loadu_pd(lane), low));
    _mm512_storeu_pd(lane + 8, _mm512_add_pd(_mm512_loadu_pd(lane + 8), high));
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
