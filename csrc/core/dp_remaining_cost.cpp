// A lower bound on the cost from a cell of a rectangle to its end; the table is pruned with it.
#include "core/dp_remaining_cost.h"

#include <algorithm>

namespace xtoken::dp {

void RemainingCost::assign(const Document& document, const Rect& rect) {
    constexpr uint8_t kInStudent = 1, kInTeacher = 2, kSpelledByStudent = 4, kSpelledByTeacher = 8;
    letter_flags_.assign(document.num_letters(), 0);
    const int32_t* s = document.student().letters.data() + rect.student_start;
    const int32_t* t = document.teacher().letters.data() + rect.teacher_start;
    for (int32_t x = 0; x < rect.rows(); ++x) letter_flags_[s[x]] |= kInStudent;
    for (int32_t x = 0; x < rect.cols(); ++x) letter_flags_[t[x]] |= kInTeacher;

    const auto charge_side = [&](const Sequence& side, int32_t start, int32_t count, uint8_t in_other,
                                 uint8_t spelled_by_side, std::vector<Rest>& rest) {
        rest.assign(count + 1, {2, 0});
        for (int32_t x = 0; x < count; ++x) {
            if (letter_flags_[side.letters[start + x]] & in_other) rest[x].charge = 0;
        }
        auto window = std::lower_bound(side.windows.begin(), side.windows.end(), start,
                                       [](const Window& w, int32_t token) { return w.last < token; });
        for (; window != side.windows.end() && window->last < start + count; ++window) {
            if (window->first < start || !(letter_flags_[window->letter] & in_other)) continue;
            letter_flags_[window->letter] |= spelled_by_side;
            for (int32_t x = window->first; x <= window->last; ++x) rest[x - start].charge = 0;
        }
    };
    charge_side(document.student(), rect.student_start, rect.rows(), kInTeacher, kSpelledByStudent, student_);
    charge_side(document.teacher(), rect.teacher_start, rect.cols(), kInStudent, kSpelledByTeacher, teacher_);

    int gap_excess = 2;
    const auto sum_up = [&](const int32_t* letters, int32_t count, uint8_t spelled_by_other, std::vector<Rest>& rest) {
        int64_t longest = 1;
        rest[count] = {0, 0};
        for (int32_t x = count - 1; x >= 0; --x) {
            int32_t charge = rest[x].charge;
            if (charge == 2 && (letter_flags_[letters[x]] & spelled_by_other)) charge = 1;
            if (charge == 1) gap_excess = 1;
            const int64_t length = charge < 2 ? document.length(letters[x]) : 0;
            longest = std::max(longest, length);
            rest[x] = {rest[x + 1].charge + charge, rest[x + 1].length + length};
        }
        return longest;
    };
    const int64_t longest_student = sum_up(s, rect.rows(), kSpelledByTeacher, student_);
    const int64_t longest_teacher = sum_up(t, rect.cols(), kSpelledByStudent, teacher_);
    const double excess = gap_excess * (1 - 1e-9);  // slightly less, so that rounding never makes the bound too high
    gaps_per_student_ = excess / static_cast<double>(longest_student);
    gaps_per_teacher_ = -excess / static_cast<double>(longest_teacher);
}

}  // namespace xtoken::dp
