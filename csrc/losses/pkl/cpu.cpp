// P-KL on the CPU: the loop over chunks, and sums over chunks in a fixed order.
#include <algorithm>
#include <vector>

#include "core/error.h"
#include "cpu/chunk_loop.h"
#include "cpu/lanes.h"
#include "losses/pkl/params.h"

namespace xtoken::cpu {
namespace {

// Gradients of W are summed in this many groups of chunks, whatever the number of threads.
constexpr int64_t weight_groups = 16;

// Floats of scratch memory that pkl_chunk needs.
int64_t workspace_of(const PklPlanView& plan) {
    const int64_t e = padded(plan.rows) + lanes, f = padded(plan.columns) + lanes;
    const int64_t h = padded(plan.rows) + lanes + lanes * plan.column_sums.slices;
    return e + f + h;
}

void pkl(const PklParams& params, const Launch& launch) {
    if (params.plan->student_size != params.student.width || params.plan->teacher_size != params.teacher.width) {
        value_error("plan: expected W of vocabularies of ", params.student.width, " and ", params.teacher.width,
                    " tokens, got ", params.plan->student_size, " and ", params.plan->teacher_size);
    }
    const auto chunk = XTOKEN_PICK(launch.level, pkl_chunk);
    const int64_t entries = params.plan->entries;
    const bool weighted = params.weight_grad != nullptr;
    ChunkLoop loop(params, params.labels);
    if (weighted) loop.groups = std::min(params.chunks, weight_groups);
    std::vector<float> sums(weighted ? loop.groups * entries : 0, 0.0f);
    loop.run(launch, [&](int64_t group, int64_t begin, int64_t end, Scratch& scratch) {
        float* workspace = scratch.take<float>(workspace_of(*params.plan));
        float* sum = weighted ? sums.data() + group * entries : nullptr;
        for (int64_t k = begin; k < end; ++k) chunk(params, k, workspace, sum);
    });
    for (int64_t e = 0; weighted && e < entries; ++e) {
        double total = 0;
        for (int64_t group = 0; group < loop.groups; ++group) total += static_cast<double>(sums[group * entries + e]);
        params.weight_grad[e] = total;
    }
}

const Launcher launcher("pkl", &pkl);

}  // namespace
}  // namespace xtoken::cpu
