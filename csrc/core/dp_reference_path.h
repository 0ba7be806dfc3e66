// The reference path: a cheap alignment that is nearly always optimal, up to small detours.
//
// It only has to be legal. Speed depends on how good it is, correctness does not.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dp_combinations.h"
#include "core/dp_move.h"

namespace xtoken::dp {

struct ReferencePath {
    std::vector<Move> moves;                      // the edges, [E]
    std::vector<int32_t> student_at, teacher_at;  // the cells: tokens consumed before each edge, [E + 1]

    int32_t size() const { return static_cast<int32_t>(moves.size()); }
    Rect rect(int32_t first, int32_t end) const {  // between two cells
        return {student_at[first], student_at[end], teacher_at[first], teacher_at[end]};
    }
};

// Walks the bytes of both sides from the front and from the back and closes a step wherever their boundaries
// meet: one move if it is legal, gaps if it is not (several tokens to several). What remains in between (where the
// texts differ) is split at tokens that occur once on each side and form the longest increasing subsequence, and
// so on recursively.
class ReferencePathBuilder {
  public:
    void build(const Document& document, ReferencePath& path);

  private:
    void align(Rect rect, int depth);
    template <bool kBackward>
    void merge(Rect& rect, std::vector<Move>& moves) const;
    void find_anchors(const Rect& rect, std::vector<std::pair<int32_t, int32_t>>& anchors);

    struct Count {
        int32_t student = 0, teacher = 0;  // occurrences in the rectangle
        int32_t teacher_at = 0;            // the last one
    };

    const Document* document_ = nullptr;
    std::vector<Move> moves_, tail_;  // from the front; from the back, last move first
    std::vector<Count> counts_;       // [letters], zero outside find_anchors
};

}  // namespace xtoken::dp
