// The moves of the dynamic program and what they cost.
//
// The paper scores an alignment; here each token is credited 1.5 and the rest is a cost:
//
//     score = 1.5 (n + m - cost),   cost: match 0, combination 1, gap 2, mismatch 4.
//
// Both orders of alignments are the same, because every token is consumed by exactly one move.
#pragma once

#include <cstdint>

namespace xtoken::dp {

constexpr int kMaxRun = 4;  // tokens on the long side of a combination, at most (L in the paper)

struct Move {
    uint8_t student, teacher;  // tokens consumed: (1, 1), (1, 0), (0, 1), (1, k) or (k, 1)
    bool equal;                // whether the two sides spell the same text: a match or a combination

    bool operator==(const Move& o) const { return student == o.student && teacher == o.teacher && equal == o.equal; }
    int cost() const {
        if (!equal) return 2 * (student + teacher);
        return student + teacher > 2 ? 1 : 0;
    }
    bool is_gap() const { return student == 0 || teacher == 0; }
};

constexpr Move kMatch{1, 1, true}, kMismatch{1, 1, false}, kStudentGap{1, 0, false}, kTeacherGap{0, 1, false};
inline Move one_to_many(int k) { return {1, static_cast<uint8_t>(k), true}; }
inline Move many_to_one(int k) { return {static_cast<uint8_t>(k), 1, true}; }

// A part of the table: student tokens [student_start, student_end) against teacher tokens [teacher_start,
// teacher_end).
struct Rect {
    int32_t student_start, student_end, teacher_start, teacher_end;
    int32_t rows() const { return student_end - student_start; }
    int32_t cols() const { return teacher_end - teacher_start; }
};

}  // namespace xtoken::dp
