// Divergences from a mixture of two distributions, 16 events at a time. For kernels, see simd.h.
#pragma once

#include "cpu/simd.h"
#include "launch/divergence.h"

namespace xtoken::cpu::XTOKEN_LEVEL {

// teacher sum Q log(Q / M) + student sum P log(P / M), M = mixture Q + (1 - mixture) P, with 0 < mixture < 1.
//
// With d = log Q - log P and t = exp(-|d|), M is max(Q, P) w where w = mixture + (1 - mixture) t for d > 0, else
// mixture t + 1 - mixture: no number leaves the range of floats, however small Q or P is.
class MixedDivergence {
  public:
    explicit MixedDivergence(const Divergence& d)
        : teacher_(static_cast<float>(d.teacher)),
          student_(static_cast<float>(d.student)),
          mixture_(static_cast<float>(d.mixture)),
          rest_(static_cast<float>(1 - d.mixture)),
          kept_(static_cast<float>(d.student * d.mixture)),
          pulled_(static_cast<float>(d.teacher * (1 - d.mixture))),
          slope_(static_cast<float>(d.student * d.mixture - d.teacher * (1 - d.mixture))),
          exp_(Exponential::around(0.0f, -1e30f, 1.0)) {}

    // teacher log(Q / M), student log(P / M) and Q / M: the divergence is the sum of Q of_teacher + P of_student.
    struct Terms {
        Floats of_teacher, of_student, share;
    };
    Terms operator()(Floats difference) const {
        const Floats zero = broadcast(0.0f), opposite = zero - difference;
        const Floats above = max(difference, zero), below = max(opposite, zero);
        const Floats t = exp_(zero - (above + below));
        const Mask larger = greater(difference, zero);
        const Floats mixture = broadcast(mixture_), rest = broadcast(rest_);
        const Floats w = select(larger, fma(rest, t, mixture), fma(mixture, t, rest));
        const Floats log_w = log(w);
        return {broadcast(-teacher_) * (log_w + below), broadcast(-student_) * (log_w + above),
                select(larger, broadcast(1.0f), t) / w};
    }

    // The derivative by P.
    Floats slope(const Terms& x) const { return fma(broadcast(slope_), x.share, x.of_student); }
    // The same where the sum has `kept` P in the place of P, but not M: that by `kept` P.
    Floats slope(const Terms& x, Floats kept) const {
        return fma(fma(broadcast(kept_), kept, broadcast(-pulled_)), x.share, x.of_student);
    }

  private:
    float teacher_, student_, mixture_, rest_, kept_, pulled_, slope_;
    Exponential exp_;
};

}  // namespace xtoken::cpu::XTOKEN_LEVEL
