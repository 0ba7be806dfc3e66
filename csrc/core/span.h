// A chunk of the alignment: two token ranges of equal text.
#pragma once

#include <cstdint>

namespace xtoken {

// Half-open token ranges of the student and the teacher.
struct Span {
    int32_t student_start, student_end, teacher_start, teacher_end;
};

}  // namespace xtoken
