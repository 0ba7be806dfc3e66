// Vectors of 16 floats in pairs of AVX2 registers; see simd.h.
#pragma once

#include <immintrin.h>

namespace xtoken::cpu::XTOKEN_LEVEL {

struct Floats {
    __m256 a, b;
};

struct Mask {
    __m256 a, b;
};

inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats reciprocal(Floats x) { return broadcast(1.0f) / x; }
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats fnma(Floats x, Floats y, Floats z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

inline uint32_t bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.a)) | static_cast<uint32_t>(_mm256_movemask_ps(m.b)) << 8;
}
inline Mask from_bits(uint32_t lanes_set) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i low = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes_set)), bit);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes_set >> 8)), bit);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(low, bit)), _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, bit))};
}
inline Mask first(int64_t n) { return from_bits(n >= 16 ? 0xFFFFu : (1u << n) - 1u); }
inline Mask greater(Floats x, Floats y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline Mask equal(Floats x, Floats y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
inline Floats select(Mask m, Floats yes, Floats no) {
    return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}

inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 from_bfloat16(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}
inline Floats load(const BFloat16* p) { return {from_bfloat16(p), from_bfloat16(p + 8)}; }
inline Floats load(const Float16* p) { return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 8))}; }

// To nearest, ties to even; the upper halves of the 32-bit lanes are zero.
inline __m256i bfloat16_bits(__m256 x) {
    const __m256i wide = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(wide, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
}
inline __m256i packed(const BFloat16*, Floats x) {
    const __m256i mixed = _mm256_packus_epi32(bfloat16_bits(x.a), bfloat16_bits(x.b));
    return _mm256_permute4x64_epi64(mixed, 0xD8);
}
inline __m256i packed(const Float16*, Floats x) {
    return _mm256_set_m128i(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
template <typename Half>
inline void store(Half* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed(p, x));
}
inline void stream(float* p, Floats x) {
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
}
template <typename Half>
inline void stream(Half* p, Floats x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed(p, x));
}
inline void stream_line(void* to, const void* from) {
    auto* out = static_cast<__m256i*>(to);
    const auto* in = static_cast<const __m256i*>(from);
    _mm256_stream_si256(out, _mm256_loadu_si256(in));
    _mm256_stream_si256(out + 1, _mm256_loadu_si256(in + 1));
}
inline void fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Loads, not the gather instruction: see simd_avx512.h.
inline __m128 gather_quarter(const float* base, const int32_t* index) {
    __m128 x = _mm_load_ss(base + index[0]);
    x = _mm_insert_ps(x, _mm_load_ss(base + index[1]), 0x10);
    x = _mm_insert_ps(x, _mm_load_ss(base + index[2]), 0x20);
    return _mm_insert_ps(x, _mm_load_ss(base + index[3]), 0x30);
}
inline __attribute__((always_inline)) Floats gather(const float* base, const int32_t* index) {
    return {_mm256_set_m128(gather_quarter(base, index + 4), gather_quarter(base, index)),
            _mm256_set_m128(gather_quarter(base, index + 12), gather_quarter(base, index + 8))};
}

inline int64_t compress(float* p, Mask m, Floats x) {
    alignas(64) float lane[16];
    store(lane, x);
    int64_t count = 0;
    for (uint32_t rest = bits(m); rest != 0; rest &= rest - 1) p[count++] = lane[__builtin_ctz(rest)];
    return count;
}
// Which of the values that follow each other goes to each of 8 lanes, by mask.
struct ExpandTable {
    uint8_t place[256][8] = {};
    constexpr ExpandTable() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int lane = 0; lane < 8; ++lane) {
                place[mask][lane] = static_cast<uint8_t>(next);
                next += mask >> lane & 1;
            }
        }
    }
};
inline constexpr ExpandTable expand_table;
inline __m256 expand_half(const float* p, uint32_t mask) {
    const __m128i place = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(expand_table.place[mask]));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_cvtepu8_epi32(place));
}
constexpr bool expand_is_quick = false;
inline Floats expand(const float* p, Mask m) {
    const uint32_t low = bits(m) & 0xFFu, high = bits(m) >> 8;
    return {_mm256_and_ps(m.a, expand_half(p, low)),
            _mm256_and_ps(m.b, expand_half(p + __builtin_popcount(low), high))};
}

inline __m256 scale_by_power(__m256 x, __m256 n) {
    n = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(128.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats scale_by_power(Floats x, Floats n) { return {scale_by_power(x.a, n.a), scale_by_power(x.b, n.b)}; }

inline __m256 split(__m256 x, __m256* exponent) {
    // Subtracting the bits of 0.75 carries into the exponent exactly where the mantissa is below 1.5.
    const __m256i shifted = _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x3F400000));
    const __m256i power = _mm256_srai_epi32(shifted, 23);
    *exponent = _mm256_cvtepi32_ps(power);
    return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(power, 23)));
}
inline Floats split(Floats x, Floats* exponent) { return {split(x.a, &exponent->a), split(x.b, &exponent->b)}; }

inline void add_to_doubles(double* lane, Floats x) {
    const __m128 quarter[4] = {_mm256_castps256_ps128(x.a), _mm256_extractf128_ps(x.a, 1), _mm256_castps256_ps128(x.b),
                               _mm256_extractf128_ps(x.b, 1)};
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_pd(lane + 4 * i, _mm256_add_pd(_mm256_loadu_pd(lane + 4 * i), _mm256_cvtps_pd(quarter[i])));
    }
}

}  // namespace xtoken::cpu::XTOKEN_LEVEL
