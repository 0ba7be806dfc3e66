// Cross-entropy of rows with a label, forward and backward.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace xtoken::cpu {

struct CrossEntropyParams {
    Logits student;
    Logits grad;  // as student, perhaps wider; data null: losses only
    Labels labels;
    float lowest;  // smaller logits count as this one
    bool add;      // to the gradient, of rows with a label; else every element of it is written
};

// Row r: its loss, and its gradient scale * (softmax(z) - onehot).
XTOKEN_KERNEL(void, cross_entropy_row, (const CrossEntropyParams& params, int64_t r))

// All rows. One thread computes a row: results do not depend on `threads`.
void cross_entropy(const CrossEntropyParams& params, Level level, int threads);

}  // namespace xtoken::cpu
