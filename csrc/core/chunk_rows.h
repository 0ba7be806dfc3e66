// The chunks of a batch of alignments: which is wrong, and the rows of logits that predict them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.h"

namespace xtoken {

// The chunks of all samples, one after the other; those of sample b begin at offsets[b].
struct BatchChunks {
    const Span* spans;  // [count]
    int64_t count;
    const int64_t* offsets;  // [samples + 1], increasing from 0
    int64_t samples;

    // visit(chunk, its sample, the chunk before it in its sample or nullptr) for each.
    template <typename Visit>
    void each(const Visit& visit) const {
        int64_t sample = 0;
        for (int64_t k = 0; k < count; ++k) {
            const Span* before = k > 0 ? spans + k - 1 : nullptr;
            for (; sample + 1 < samples && offsets[sample + 1] <= k; ++sample) before = nullptr;
            visit(k, sample, before);
        }
    }
};

// The first chunk that is empty, negative, or not behind the one before it; -1: none is.
inline int64_t wrong_chunk(const BatchChunks& chunks) {
    int64_t wrong = -1;
    chunks.each([&](int64_t k, int64_t, const Span* before) {
        const Span& s = chunks.spans[k];
        const Span least = before == nullptr ? Span{} : *before;
        const bool is_right = s.student_start >= std::max(least.student_end, 0) && s.student_end > s.student_start &&
                              s.teacher_start >= std::max(least.teacher_end, 0) && s.teacher_end > s.teacher_start;
        if (!is_right && wrong < 0) wrong = k;
    });
    return wrong;
}

// [7, K] of the K chunks that are `predicted` [count] and have a token before them on both sides: number, sample, on
// each side the row of that token and how many rows there are, and whether it begins where the chunk before it ends.
inline std::vector<int64_t> predictor_rows(const BatchChunks& chunks, const bool* predicted) {
    const auto is_used = [&](int64_t k) {
        return predicted[k] && chunks.spans[k].student_start > 0 && chunks.spans[k].teacher_start > 0;
    };
    size_t used = 0;
    for (int64_t k = 0; k < chunks.count; ++k) used += is_used(k);
    std::vector<int64_t> rows(7 * used);
    int64_t* next = rows.data();
    chunks.each([&](int64_t k, int64_t sample, const Span* before) {
        if (!is_used(k)) return;
        const Span& s = chunks.spans[k];
        const bool follows =
            before != nullptr && before->student_end == s.student_start && before->teacher_end == s.teacher_start;
        const int64_t a = s.student_start, b = s.student_end, c = s.teacher_start, d = s.teacher_end;
        const int64_t column[] = {k, sample, a - 1, b - a, c - 1, d - c, follows};
        for (size_t i = 0; i < 7; ++i) next[i * used] = column[i];
        ++next;
    });
    return rows;
}

}  // namespace xtoken
