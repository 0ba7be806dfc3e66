// The byte merge: cuts two token sequences of the same text at every boundary that both share, in linear time.
#pragma once

#include <cstdint>
#include <vector>

#include "core/span.h"
#include "core/token_pair.h"

namespace xtoken {

// Walks symbols student[0, n) and teacher[0, m) of `pair`. Where both sides spell the same text, appends the finest
// common chunks to `chunks`. Where they disagree (an edit, a one-sided special token, a dummy space, a text that ends
// early), appends the smallest stretch found that bridges to the next agreement to `gaps`, and goes on behind it.
// Chunks and gaps are in order, do not overlap, and together cover everything but tokens of empty text. A gap may be
// empty on one side. Positions are relative to the arguments.
void align_bytes(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                 std::vector<Span>& chunks, std::vector<Span>& gaps);

}  // namespace xtoken
