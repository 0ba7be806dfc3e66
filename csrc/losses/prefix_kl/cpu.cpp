// Prefix KL on the CPU: the boundaries inside tokens, and the loop over chunks.
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "cpu/chunk_loop.h"
#include "cpu/lanes.h"
#include "losses/prefix_kl/params.h"

namespace xtoken::cpu {
namespace {

// Bytes of scratch memory, aligned to 64, that prefix_chunk needs.
int64_t workspace_of(const PrefixChunks& params) {
    const PrefixPlanView& plan = *params.plan;
    const int64_t students = padded(params.student.width), teachers = padded(params.teacher.width) + lanes;
    const auto longest = [](const TokensView& lists) { return lists.slices == 0 ? 0 : lists.start[1]; };
    const int64_t start = 2 * students + teachers + 2 * padded(plan.events) + padded(plan.others) + 2 * lanes +
                          lanes * std::max(longest(plan.student.lists), longest(plan.teacher.lists));
    const int64_t inside = 7 * padded(params.most + 1) + 3 * padded(params.most);
    const int64_t row = students + 2 * std::max(students, teachers) / lanes;
    const int64_t left_out = plan.student.most_known + plan.teacher.most_known + padded(plan.events) / 2;
    return 4 * (start + inside + row + left_out) + 64 * 34;
}

// Throws Error if a chunk's token is outside the vocabulary.
void prefix(const PrefixParams& params, const Launch& launch) {
    const auto& [students, teachers] = params.plan->index.side;
    if (students.size != params.student.width || teachers.size != params.teacher.width) {
        value_error("plan: expected a piece index of vocabularies of ", params.student.width, " and ",
                    params.teacher.width, " tokens, got ", students.size, " and ", teachers.size);
    }
    const std::vector<InnerBoundary> boundaries = inner_boundaries(
        params.plan->index, static_cast<size_t>(params.chunks),
        {params.student_rows.start, params.student_rows.count, params.student_rows.next, params.student.rows()},
        {params.teacher_rows.start, params.teacher_rows.count, params.teacher_rows.next, params.teacher.rows()});
    std::vector<int64_t> first_boundary(params.chunks + 1, 0);
    int64_t most = 0;
    for (const InnerBoundary& boundary : boundaries) {
        ++first_boundary[boundary.chunk + 1];
        most = std::max(most, boundary.last - boundary.first);
    }
    std::partial_sum(first_boundary.begin(), first_boundary.end(), first_boundary.begin());
    const PrefixChunks chunks{params, boundaries.data(), first_boundary.data(), most};
    const auto chunk = XTOKEN_PICK(launch.level, prefix_chunk);
    ChunkLoop(params, params.labels).run(launch, [&](int64_t, int64_t begin, int64_t end, Scratch& scratch) {
        char* workspace = scratch.take<char>(workspace_of(chunks));
        for (int64_t k = begin; k < end; ++k) chunk(chunks, k, workspace);
    });
}

const Launcher launcher("prefix_kl", &prefix);

}  // namespace
}  // namespace xtoken::cpu
