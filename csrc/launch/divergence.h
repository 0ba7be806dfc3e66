// The divergence of the teacher's distribution Q and the student's P that a loss takes.
#pragma once

#include "launch/fields.h"

namespace xtoken {

// teacher sum Q log(Q / M) + student sum P log(P / M), M = mixture Q + (1 - mixture) P. Forward KL: 1, 0, 0; reverse:
// 0, 1, 1.
struct Divergence {
#define XTOKEN_DIVERGENCE(FIELD)                    \
    FIELD(double, teacher, "factor of KL(Q || M)"); \
    FIELD(double, student, "factor of KL(P || M)"); \
    FIELD(double, mixture, "the teacher's share of M; 0: M is P, 1: M is Q")
    XTOKEN_FIELDS(XTOKEN_DIVERGENCE)

    bool is_mixed() const { return mixture > 0 && mixture < 1; }
};

// What a loss takes that has one.
#define XTOKEN_DIVERGES(FIELD, of_what)                                                                  \
    FIELD(bool, reverse, "the KL of the student from the teacher, not of the teacher from the student"); \
    FIELD(Divergence, divergence, of_what)

}  // namespace xtoken
