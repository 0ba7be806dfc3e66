// A lower bound on the cost from a cell of a rectangle to its end; the table is pruned with it.
//
// Charges as in the certificate, over all fragments inside the rectangle. Matches and combinations do not change
// the difference between the lengths consumed on the two sides (tokens of charge 2 are in neither and do not
// count), so the remaining difference needs gaps, and a gap costs 2 instead of the token's charge.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dp_combinations.h"
#include "core/dp_move.h"

namespace xtoken::dp {

class RemainingCost {
  public:
    void assign(const Document& document, const Rect& rect);
    double operator()(int32_t i, int32_t j) const {
        const int64_t ahead = student_[i].length - teacher_[j].length;
        const double gaps = static_cast<double>(ahead) * (ahead > 0 ? gaps_per_student_ : gaps_per_teacher_);
        return student_[i].charge + teacher_[j].charge + gaps;
    }

  private:
    struct Rest {
        int32_t charge;  // of the tokens from here on
        int64_t length;
    };
    std::vector<Rest> student_, teacher_;
    double gaps_per_student_ = 0, gaps_per_teacher_ = 0;  // cost of a unit of length; the second is negative
    std::vector<uint8_t> letter_flags_;
};

}  // namespace xtoken::dp
