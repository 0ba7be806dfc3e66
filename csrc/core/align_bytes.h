// The byte merge: cuts two token sequences of the same text at every boundary that both share, in linear time.
#pragma once

#include <cstdint>
#include <vector>

#include "core/span.h"
#include "core/token_pair.h"

namespace xtoken {

// Which side comes first where nothing that they spell decides, so that the result does not depend on which side is
// called the student. Equal vocabularies have equal symbols on both sides, which then decide.
enum class SideOrder { student, teacher, by_symbol };

// Walks symbols student[0, n) and teacher[0, m) of `pair`. Where both sides spell the same text, appends the finest
// common chunks to `chunks`. Where they disagree (an edit, a one-sided special token), appends the smallest stretch
// found that bridges to the next agreement to `gaps`, and continues after it. Where they disagree by a space at the
// start of a token (a dummy space), continues at the next boundary that both share. Stops where the text of one side
// ends inside a token of the other: the rest is not the same text, even if words of it agree. Chunks and gaps are in
// order, do not overlap, and cover everything up to there but tokens of empty text and those around a dummy space. A
// gap may be empty on one side. Positions are relative to the arguments.
void align_bytes(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                 SideOrder order, std::vector<Span>& chunks, std::vector<Span>& gaps);

}  // namespace xtoken
