// Divergences from a mixture of two distributions; see csrc/cpu/divergence.h for the algebra.
#pragma once

#include "cuda/rows.cuh"
#include "launch/divergence.h"

namespace xtoken::cuda {

// As Divergence::is_mixed, which is the host's.
__device__ inline bool is_mixed(const Divergence& d) { return d.mixture > 0.0 && d.mixture < 1.0; }

// teacher sum Q log(Q / M) + student sum P log(P / M), M = mixture Q + (1 - mixture) P, with 0 < mixture < 1.
class MixedDivergence {
  public:
    __device__ MixedDivergence(const Divergence& d, bool precise)
        : precise_(precise),
          teacher_(static_cast<float>(d.teacher)),
          student_(static_cast<float>(d.student)),
          mixture_(static_cast<float>(d.mixture)),
          rest_(static_cast<float>(1.0 - d.mixture)),
          kept_(static_cast<float>(d.student * d.mixture)),
          pulled_(static_cast<float>(d.teacher * (1.0 - d.mixture))),
          slope_(static_cast<float>(d.student * d.mixture - d.teacher * (1.0 - d.mixture))) {}

    // teacher log(Q / M), student log(P / M) and Q / M: the divergence is the sum of Q of_teacher + P of_student.
    struct Terms {
        float of_teacher, of_student, share;
    };
    // Of log Q - log P.
    __device__ Terms operator()(float difference) const {
        const float above = fmaxf(difference, 0.0f), below = fmaxf(-difference, 0.0f);
        const float t = exponential(-(above + below), precise_);
        const bool larger = difference > 0.0f;
        const float w = larger ? fmaf(rest_, t, mixture_) : fmaf(mixture_, t, rest_);
        const float log_w = logarithm(w, precise_);
        return {-teacher_ * (log_w + below), -student_ * (log_w + above), quotient(larger ? 1.0f : t, w, precise_)};
    }

    // The derivative by P.
    __device__ float slope(const Terms& x) const { return fmaf(slope_, x.share, x.of_student); }
    // The same where the sum has `kept` P in the place of P, but not M: that by `kept` P.
    __device__ float slope(const Terms& x, float kept) const {
        return fmaf(fmaf(kept_, kept, -pulled_), x.share, x.of_student);
    }

  private:
    bool precise_;
    float teacher_, student_, mixture_, rest_, kept_, pulled_, slope_;
};

}  // namespace xtoken::cuda
