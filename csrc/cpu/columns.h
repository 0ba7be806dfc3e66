// The columns with the largest logits.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace xtoken::cpu {

// maxima[c] = the largest of column c over all rows, NaN if there is one, for begin <= c < end.
XTOKEN_KERNEL(void, column_maxima, (const Logits& logits, int64_t begin, int64_t end, float* maxima))

// ids [count], ascending: the columns with the largest maxima over all rows, at least one; lower ids first among
// equals, NaN before everything. 0 < count <= width.
void largest_columns(const Logits& logits, int64_t count, int64_t* ids, Level level, int threads);

}  // namespace xtoken::cpu
