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
inline Floats load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
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
inline void fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Sixteen loads: on Zen 4 in 3.5 ns, where the gather instruction takes 6; and it is slow on every Intel processor with
// a correction for "Downfall".
inline __m128 gather_quarter(const float* base, const int32_t* index) {
    __m128 x = _mm_load_ss(base + index[0]);
    x = _mm_insert_ps(x, _mm_load_ss(base + index[1]), 0x10);
    x = _mm_insert_ps(x, _mm_load_ss(base + index[2]), 0x20);
    return _mm_insert_ps(x, _mm_load_ss(base + index[3]), 0x30);
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
inline Floats expand(const float* p, Mask m) { return {_mm512_maskz_expand_ps(m.v, _mm512_loadu_ps(p))}; }

// x 2^n for whole numbers n; 0 where that is too small.
inline Floats scale_by_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// x = 2^exponent * result, result in [0.75, 1.5).
inline Floats split(Floats x, Floats* exponent) {
    // Subtracting the bits of 0.75 carries into the exponent exactly where the mantissa is below 1.5.
    const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3F400000));
    exponent->v = _mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23));
    return {_mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero)};
}

inline void add_to_doubles(double* lane, Floats x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    _mm512_storeu_pd(lane, _mm512_add_pd(_mm512_loadu_pd(lane), low));
    _mm512_storeu_pd(lane + 8, _mm512_add_pd(_mm512_loadu_pd(lane + 8), high));
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
