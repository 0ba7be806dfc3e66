// GOLD, H-KL and ULD: the layouts of the pairs, and the loop over chunks.
#include "cpu/gold.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "cpu/huge_pages.h"
#include "cpu/pool.h"

namespace xtoken::cpu {
namespace {

constexpr int64_t lanes = 16;

int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

void check_id(int64_t id, int64_t size, const char* name) {
    if (id < 0 || id >= size) value_error(name, ": expected ids in 0 ... ", size - 1, ", got ", id);
}

}  // namespace

GoldPlan::GoldPlan(const int64_t* student_ids, const int64_t* teacher_ids, int64_t pairs, int64_t students,
                   int64_t teachers)
    : students_(students),
      teachers_(teachers),
      partner_(padded(teachers)),
      slot_(padded(students), -1),
      common_(padded(teachers) / lanes) {
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t s = student_ids[i], t = teacher_ids[i];
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
    student_rest_ = static_cast<int64_t>(student_others_.size());
    teacher_rest_ = static_cast<int64_t>(teacher_others_.size());
    student_others_.resize(padded(student_rest_));
    teacher_others_.resize(padded(teacher_rest_));
}

GoldPlanView GoldPlan::view() const {
    return {partner_.data(), common_.data(), student_others_.data(), teacher_others_.data(), student_rest_,
            teacher_rest_,   slot_.data()};
}

int64_t gold_workspace(const GoldParams& params, int64_t rows) {
    const int64_t students = params.student.width, teachers = params.teacher.width;
    const int64_t p = params.plan.slot == nullptr ? students : params.plan.student_rest;
    const int64_t q = params.plan.slot == nullptr ? teachers : params.plan.teacher_rest;
    // Sums of rows, values and slots, and six words for each value that may have to be sorted; each rounded up.
    return 64 * rows + 4 * (students + 2 * teachers + p) + 24 * (p + q) + 64 * 16;
}

void gold(const GoldParams& params, Level level, int threads) {
    prefer_huge_pages(params.grad);
    const auto chunk = XTOKEN_PICK(level, gold_chunk);
    const ChunkRows& rows = params.student_rows;
    std::vector<int64_t> unused;
    if (params.grad.data != nullptr) {
        std::vector<char> covered(params.grad.rows(), 0);
        for (int64_t k = 0; k < params.chunks; ++k) std::fill_n(covered.begin() + rows.start[k], rows.count[k], 1);
        for (int64_t r = 0; r < params.grad.rows(); ++r) {
            if (!covered[r]) unused.push_back(r);
        }
    }
    run_items(params.chunks + static_cast<int64_t>(unused.size()), threads, [&](int64_t item, Scratch& scratch) {
        if (item < params.chunks) {
            return chunk(params, item, scratch.take<char>(gold_workspace(params, rows.count[item])));
        }
        const int64_t bytes = params.grad.width * element_size(params.grad.type);
        std::memset(params.grad.row(unused[item - params.chunks]), 0, bytes);
    });
}

}  // namespace xtoken::cpu
