// A KL on pairs and the sorted L1 elsewhere, on the CPU: the layouts of the pairs, and the loop over chunks.
#include <algorithm>
#include <memory>
#include <vector>

#include "core/error.h"
#include "cpu/chunk_loop.h"
#include "cpu/lanes.h"
#include "losses/ranked/params.h"

namespace xtoken::cpu {
namespace {

void check_id(int64_t id, int64_t size, const char* name) {
    if (id < 0 || id >= size) value_error(name, ": expected ids in 0 ... ", size - 1, ", got ", id);
}

struct PairsParams {
#define XTOKEN_CPU_PAIRS(FIELD)                                   \
    FIELD(Values<int64_t>, student_ids, "[pairs], distinct");     \
    FIELD(Values<int64_t>, teacher_ids, "[pairs], distinct");     \
    FIELD(int64_t, students, "size of the student's vocabulary"); \
    FIELD(int64_t, teachers, "size of the teacher's vocabulary")
    XTOKEN_FIELDS(XTOKEN_CPU_PAIRS)
};

// Owns what its view shows.
class PairsPlan : public PairsView {
  public:
    // Throws if an id is out of range or occurs twice.
    explicit PairsPlan(const PairsParams& given) : PairsView{} {
        students = given.students;
        teachers = given.teachers;
        partner_.resize(padded(teachers));
        slot_.resize(padded(students), -1);
        common_.resize(padded(teachers) / lanes);
        for (int64_t i = 0; i < given.student_ids.size; ++i) {
            const int64_t s = given.student_ids.data[i], t = given.teacher_ids.data[i];
            check_id(s, students, "student_ids");
            check_id(t, teachers, "teacher_ids");
            uint16_t& word = common_[t / lanes];
            const auto bit = static_cast<uint16_t>(1u << t % lanes);
            if (slot_[s] >= 0) value_error("student_ids: expected distinct ids, got ", s, " twice");
            if ((word & bit) != 0) value_error("teacher_ids: expected distinct ids, got ", t, " twice");
            slot_[s] = static_cast<int32_t>(t);
            partner_[t] = static_cast<int32_t>(s);
            word = static_cast<uint16_t>(word | bit);
        }
        for (int64_t s = 0; s < students; ++s) {
            if (slot_[s] >= 0) continue;
            slot_[s] = static_cast<int32_t>(padded(teachers) + static_cast<int64_t>(student_others_.size()));
            student_others_.push_back(static_cast<int32_t>(s));
        }
        std::fill(slot_.begin() + students, slot_.end(), 0);
        for (int64_t t = 0; t < teachers; ++t) {
            if ((common_[t / lanes] >> t % lanes & 1) == 0) teacher_others_.push_back(static_cast<int32_t>(t));
        }
        student_rest = static_cast<int64_t>(student_others_.size());
        teacher_rest = static_cast<int64_t>(teacher_others_.size());
        student_others_.resize(padded(student_rest));
        teacher_others_.resize(padded(teacher_rest));
        partner = partner_.data();
        common = common_.data();
        student_others = student_others_.data();
        teacher_others = teacher_others_.data();
        slot = slot_.data();
    }
    PairsPlan(const PairsPlan&) = delete;
    PairsPlan& operator=(const PairsPlan&) = delete;

  private:
    std::vector<int32_t> partner_, student_others_, teacher_others_, slot_;
    std::vector<uint16_t> common_;
};

std::shared_ptr<const PairsView> build_pairs(const PairsParams& params) {
    if (params.student_ids.size != params.teacher_ids.size) {
        value_error("teacher_ids: expected ", params.student_ids.size, " ids (as student_ids), got ",
                    params.teacher_ids.size);
    }
    return std::make_shared<const PairsPlan>(params);
}

// Bytes of scratch memory, aligned to 64, that ranked_chunk needs for a chunk of `rows` student rows.
int64_t workspace_of(const RankedParams& params, int64_t rows) {
    const int64_t students = params.student.width, teachers = params.teacher.width;
    const int64_t p = params.plan == nullptr ? students : params.plan->student_rest;
    const int64_t q = params.plan == nullptr ? teachers : params.plan->teacher_rest;
    // Sums of rows, values and slots, and six words for each value that may have to be sorted; each rounded up.
    const int64_t sorting = 64 * rows + 4 * (students + 2 * teachers + p) + 24 * (p + q) + 64 * 16;
    if (params.plan != nullptr) return sorting;
    // Six words at most for each value that occurs, and the gradient of each; each rounded up.
    const auto room = [](int64_t size) { return padded(std::min<int64_t>(size, value_counts) + 1); };
    const int64_t steps = 24 * (room(students) + room(teachers)) + 2 * value_counts + 64 * 16;
    return std::max(sorting, steps);
}

void ranked(const RankedParams& params, const Launch& launch) {
    const PairsView* plan = params.plan;
    if (plan != nullptr && (plan->students != params.student.width || plan->teachers != params.teacher.width)) {
        value_error("plan: expected pairs of vocabularies of ", params.student.width, " and ", params.teacher.width,
                    " tokens, got ", plan->students, " and ", plan->teachers);
    }
    const auto chunk = XTOKEN_PICK(launch.level, ranked_chunk);
    ChunkLoop(params, Labels{}).run(launch, [&](int64_t, int64_t begin, int64_t end, Scratch& scratch) {
        const int64_t* count = params.student_rows.count;
        const int64_t most = *std::max_element(count + begin, count + end);
        char* workspace = scratch.take<char>(workspace_of(params, most));
        auto* counts = scratch.take<int32_t>(value_counts);
        std::fill_n(counts, value_counts, 0);
        for (int64_t k = begin; k < end; ++k) chunk(params, k, counts, workspace);
    });
}

const Launcher launcher("ranked", &ranked);
const Builder builder("pairs_plan", &build_pairs);

}  // namespace
}  // namespace xtoken::cpu
