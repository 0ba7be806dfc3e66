// The certificate: where an optimal alignment may leave the reference path R, and where it cannot.
//
// Cut an alignment at the cells of R that it visits. Between two of them it either follows R or makes an
// excursion, which uses no edge of R and consumes every token of the rectangle between the two cells once. A
// fragment is a match or a combination of the document. An excursion costs at least
//
//   (A) the sum of its tokens' charges: 0 if the token is in a match, or on the long side of a combination,
//       that is not R's own edge; else 1 if it may be the single side of one; else 2 (a gap). A fragment
//       inside a rectangle of r edges spans fewer than r edges of R, so a charge of 0 needs one with a span
//       below r;
//   (B) 4, if no token is empty and R has no gap there: R then visits every cell of its byte diagonal, so the
//       excursion leaves it and comes back, at least one gap on each side.
//
// Where R is strictly cheaper than that for every interval around an edge, every optimal alignment uses the
// edge. The rest falls into regions, whose optima can be found one by one; the path through all of them is
// optimal, and with the same preference among ties it is the path of the whole table.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dp_combinations.h"
#include "core/dp_reference_path.h"

namespace xtoken::dp {

struct EdgeRange {
    int32_t first, end;
};

class Certificate {
  public:
    // The regions, in order. With `all_ties`, every optimal alignment stays inside them; without, at
    // least one.
    void find_regions(const Document& document, const ReferencePath& path, bool all_ties,
                      std::vector<EdgeRange>& regions);

  private:
    struct Side {
        std::vector<int32_t> edge;  // of R, per token
        std::vector<int32_t> span;  // the smallest of a fragment that lowers the token's charge to 0
    };

    void place_tokens(const std::vector<int32_t>& at, Side& side) const;
    void find_spans(bool student_is_single);
    int charges(int32_t edge, int32_t edges_in_reach) const;
    void split(EdgeRange range, bool all_ties, std::vector<EdgeRange>& covered);

    const Document* document_ = nullptr;
    const ReferencePath* path_ = nullptr;
    Side student_, teacher_;
    std::vector<Window> runs_;
    std::vector<int32_t> nearest_, previous_;
    std::vector<int64_t> gain_, highest_;
};

}  // namespace xtoken::dp
