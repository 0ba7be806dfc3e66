// The columns with the largest logits.
#pragma once

#include "cpu/dispatch.h"
#include "launch/arguments.h"

namespace xtoken::cpu {

// maxima[c] = the largest of column c over all rows, NaN if there is one, for begin <= c < end.
XTOKEN_KERNEL(void, column_maxima, (const Logits& logits, int64_t begin, int64_t end, float* maxima))

struct ColumnsParams {
#define XTOKEN_CPU_COLUMNS(FIELD)                                                                 \
    FIELD(Logits, logits, "[B, T, V], at least one row");                                         \
    FIELD(int64_t, count, "how many columns, 1 ... V");                                           \
    FIELD(int64_t*, ids,                                                                          \
          "[count] out, ascending: those with the largest maxima over all rows; lower ids first " \
          "among equals, NaN before everything")
    XTOKEN_FIELDS(XTOKEN_CPU_COLUMNS)
};

}  // namespace xtoken::cpu
