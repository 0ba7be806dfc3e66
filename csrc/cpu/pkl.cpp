// P-KL, forward and backward in one pass over each chunk.
#include "cpu/pkl.h"

#include <algorithm>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/huge_pages.h"
#include "cpu/pool.h"

namespace xtoken::cpu {
namespace {

// Gradients of W are summed in this many groups of chunks, whatever the number of threads.
constexpr int64_t weight_groups = 16;
// Neighbouring chunks, or rows without one, that one item takes where there are enough: so threads do not wait for each
// other at the first write to a huge page.
constexpr int64_t row_group = 8;

int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace

int64_t pkl_workspace(const PlanView& plan) {
    const int64_t e = whole(plan.rows) + 16, f = whole(plan.columns) + 16;
    const int64_t h = whole(plan.rows) + 16 + 16 * plan.column_sums.slices;
    return e + f + h;
}

void pkl(const PklParams& params, Level level, int threads) {
    const auto chunk = XTOKEN_PICK(level, pkl_chunk);
    const auto other = XTOKEN_PICK(level, cross_entropy_row);
    const CrossEntropyParams labels{params.student, params.grad, params.labels, params.definition.lowest, false};

    prefer_huge_pages(params.grad);
    std::vector<int64_t> other_rows;
    if (params.grad.data != nullptr || params.labels.ids != nullptr) {
        std::vector<char> covered(params.student.rows(), 0);
        for (int64_t k = 0; k < params.chunks; ++k) {
            const int64_t start = params.student_rows.start[k];
            std::fill_n(covered.begin() + start, params.student_rows.count[k], 1);
        }
        for (int64_t r = 0; r < params.student.rows(); ++r) {
            if (!covered[r]) other_rows.push_back(r);
        }
    }
    const auto others = static_cast<int64_t>(other_rows.size());
    const int64_t few = params.chunks / (8 * std::max(threads, 1));  // so that the threads end at about the same time
    const int64_t together = std::min(row_group, std::max<int64_t>(few, 1));
    const int64_t groups = params.weight_grad == nullptr ? (params.chunks + together - 1) / together
                                                         : std::min(params.chunks, weight_groups);
    const int64_t entries = params.plan.entries;
    std::vector<float> sums(params.weight_grad == nullptr ? 0 : groups * entries, 0.0f);
    const int64_t items = groups + (others + row_group - 1) / row_group;
    run_items(items, threads, [&](int64_t item, Scratch& scratch) {
        if (item >= groups) {
            const int64_t begin = (item - groups) * row_group;
            for (int64_t i = begin; i < std::min(others, begin + row_group); ++i) other(labels, other_rows[i]);
            return;
        }
        float* workspace = scratch.take<float>(pkl_workspace(params.plan));
        float* sum = sums.empty() ? nullptr : sums.data() + item * entries;
        const int64_t begin = params.chunks * item / groups, end = params.chunks * (item + 1) / groups;
        for (int64_t k = begin; k < end; ++k) chunk(params, k, workspace, sum);
    });
    for (int64_t e = 0; params.weight_grad != nullptr && e < entries; ++e) {
        double total = 0;
        for (int64_t group = 0; group < groups; ++group) total += static_cast<double>(sums[group * entries + e]);
        params.weight_grad[e] = total;
    }
}

}  // namespace xtoken::cpu
