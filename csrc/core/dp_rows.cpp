// The two vector operations that fill a row of the table.
//
// Plain loops that the compiler vectorises; where the loader can choose at run time (glibc on x86-64), each is
// compiled for AVX-512, AVX2 and the baseline.
#include "core/dp_rows.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define XTOKEN_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define XTOKEN_VECTOR_CLONES
#endif

namespace xtoken::dp {

XTOKEN_VECTOR_CLONES
void raise_row(int32_t* row, const int32_t* base, const int32_t* from, const int32_t* key, int32_t wanted, int32_t gain,
               int32_t count) {
    for (int32_t x = 0; x < count; ++x) {
        row[x] = std::max(base[x], key[x] == wanted ? from[x] + gain : 0);
    }
}

XTOKEN_VECTOR_CLONES
int32_t running_max(int32_t* row, int32_t floor, int32_t count) {
    int32_t x = 0;
#if defined(__GNUC__) && !defined(__clang__)
    // Three doubling steps inside eight lanes; only the carry to the next eight is serial.
    typedef int32_t Lanes __attribute__((vector_size(32)));
    Lanes carry = Lanes{} + floor;
    for (; x + 8 <= count; x += 8) {
        Lanes v, w;
        std::memcpy(&v, row + x, sizeof v);
        w = __builtin_shuffle(v, Lanes{0, 0, 1, 2, 3, 4, 5, 6});
        v = v > w ? v : w;
        w = __builtin_shuffle(v, Lanes{0, 1, 0, 1, 2, 3, 4, 5});
        v = v > w ? v : w;
        w = __builtin_shuffle(v, Lanes{0, 1, 2, 3, 0, 1, 2, 3});
        v = v > w ? v : w;
        v = v > carry ? v : carry;
        std::memcpy(row + x, &v, sizeof v);
        carry = __builtin_shuffle(v, Lanes{7, 7, 7, 7, 7, 7, 7, 7});
    }
    floor = carry[0];
#endif
    for (; x < count; ++x) row[x] = floor = std::max(floor, row[x]);
    return floor;
}

}  // namespace xtoken::dp
