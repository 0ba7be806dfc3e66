// Cross-entropy of rows with a label, forward and backward.
#pragma once

#include "cpu/dispatch.h"
#include "launch/arguments.h"

namespace xtoken::cpu {

struct CrossEntropyParams {
#define XTOKEN_CPU_CROSS_ENTROPY(FIELD)                                  \
    FIELD(Logits, student, "[B, T, V]");                                 \
    FIELD(Logits, grad, "as student, perhaps wider; null: losses only"); \
    FIELD(Labels, labels, "of the rows");                                \
    FIELD(float, lowest, "smaller logits count as this one");            \
    FIELD(bool, add, "to the gradient, of rows with a label; else every element of it is written")
    XTOKEN_FIELDS(XTOKEN_CPU_CROSS_ENTROPY)
};

// Row r: its loss, and its gradient scale * (softmax(z) - onehot).
XTOKEN_KERNEL(void, cross_entropy_row, (const CrossEntropyParams& params, int64_t r))

}  // namespace xtoken::cpu
