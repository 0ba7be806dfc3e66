// The certificate: where an optimal alignment may leave the reference path R, and where it cannot.
//
// Cut an alignment at the cells of R that it visits. Between two of them it either follows R or makes an excursion,
// which uses no edge of R and consumes every token of the rectangle between the two cells once. A fragment is a
// match or a combination of the document. An excursion costs at least
//
//   (A) the sum of its tokens' charges: 0 if the token is in a match or on the long side of a combination that is not
//       R's own edge, else 1 if it is the single side of such a combination, else 2 (a gap). A fragment inside a
//       rectangle of r edges spans fewer than r edges of R, so it counts only if its span is below r;
//   (B) 4, if no token is empty and R has no gap there: R then visits every cell of its byte diagonal, so the
//       excursion leaves it and comes back, at least one gap on each side.
//
// Where R is strictly cheaper than that for every interval around an edge, every optimal alignment uses the edge. The
// rest falls into regions, whose optima can be found one by one; the path through all of them is optimal, and with the
// same preference among ties it is the path of the whole table.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/dp_combinations.h"
#include "core/dp_reference_path.h"

namespace xtoken::dp {

struct EdgeRange {
    int32_t first, end;
};

class Certificate {
  public:
    // Appends the regions, in order. With `all_ties`, every optimal alignment stays inside them; without, at least one.
    void find_regions(const Document& document, const ReferencePath& path, bool all_ties,
                      std::vector<EdgeRange>& regions);

  private:
    // A token or a window with its place on R.
    struct Item {
        int32_t first_edge, last_edge;
        int32_t letter;
    };
    // Per token of one side: its place, and the smallest span of a fragment that lowers its charge to 0 or 1.
    struct Side {
        std::vector<Item> tokens;
        std::vector<int32_t> span_to_0, span_to_1;
    };
    void place_tokens(const Sequence& sequence, const std::vector<int32_t>& at, Side& side);
    void find_spans(bool student_is_single);
    template <typename Own, typename Use>
    void for_nearest(const std::vector<Item>& queries, const std::vector<Item>& targets, Own own, Use use);
    void split(EdgeRange range, bool all_ties, std::vector<EdgeRange>& covered);

    const Document* document_ = nullptr;
    const ReferencePath* path_ = nullptr;
    Side student_, teacher_;
    std::vector<Item> windows_;
    std::vector<int32_t> nearest_, previous_;
    std::vector<int64_t> gain_, highest_;
    std::vector<std::pair<EdgeRange, bool>> open_;  // intervals to certify; whether it is the whole path
};

}  // namespace xtoken::dp
