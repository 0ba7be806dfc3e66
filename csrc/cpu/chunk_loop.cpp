// The loop of every loss over its chunks, and over the rows of no chunk.
#include "cpu/chunk_loop.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "cpu/cross_entropy.h"
#include "cpu/huge_pages.h"

namespace xtoken::cpu {
namespace {

// Neighbouring chunks, or rows without one, that one item takes where there are enough: so threads do not wait for each
// other at the first write to a huge page.
constexpr int64_t row_group = 8;

std::vector<int64_t> rows_of_no_chunk(const ChunkLoop& loop) {
    std::vector<int64_t> result;
    if (loop.grad.data == nullptr && loop.labels.ids == nullptr) return result;
    std::vector<char> covered(loop.student.rows(), 0);
    for (int64_t k = 0; k < loop.chunks; ++k) std::fill_n(covered.begin() + loop.rows.start[k], loop.rows.count[k], 1);
    for (int64_t r = 0; r < loop.student.rows(); ++r) {
        if (!covered[r]) result.push_back(r);
    }
    return result;
}

}  // namespace

void ChunkLoop::check_rows(const char* side, const ChunkRows& rows, int64_t chunks, const Logits& logits) {
    for (int64_t k = 0; k < chunks; ++k) {
        if (rows.start[k] < 0 || rows.count[k] < 1 || rows.start[k] > logits.rows() - rows.count[k]) {
            value_error("alignment: chunk ", k, " begins at row ", rows.start[k], " of the ", side, " and has ",
                        rows.count[k], ", of ", logits.rows(), " in all");
        }
    }
}

std::vector<int64_t> ChunkLoop::bounds(int threads) const {
    std::vector<int64_t> result;
    for (int64_t group = 0; group < groups; ++group) result.push_back(chunks * group / groups);
    for (int64_t begin = 0; groups == 0 && begin < chunks;) {
        result.push_back(begin);
        // fewer towards the end, so that the threads end at about the same time
        begin += std::clamp<int64_t>((chunks - begin) / (4 * std::max(threads, 1)), 1, row_group);
    }
    result.push_back(chunks);
    return result;
}

void ChunkLoop::run(const Launch& launch, const Body& body) const {
    prefer_huge_pages(grad);
    const auto other = XTOKEN_PICK(launch.level, cross_entropy_row);
    const CrossEntropyParams one{student, grad, labels, lowest, false};
    const std::vector<int64_t> other_rows = rows_of_no_chunk(*this), bound = bounds(launch.threads);
    const auto others = static_cast<int64_t>(other_rows.size()), last = static_cast<int64_t>(bound.size()) - 1;
    const int64_t other_groups = (others + row_group - 1) / row_group;
    run_items(other_groups + last, launch.threads, [&](int64_t item, Scratch& scratch) {
        const int64_t group = item - other_groups, begin = item * row_group;
        if (group >= 0) return body(group, bound[group], bound[group + 1], scratch);
        for (int64_t i = begin; i < std::min(others, begin + row_group); ++i) other(one, other_rows[i]);
    });
}

}  // namespace xtoken::cpu
