// Prefix KL: the layout of a piece index, and the loop over chunks.
#include "cpu/prefix.h"

#include <algorithm>
#include <numeric>

#include "cpu/cross_entropy.h"
#include "cpu/huge_pages.h"
#include "cpu/plan.h"
#include "cpu/pool.h"

namespace xtoken::cpu {
namespace {

constexpr int64_t lanes = 16;
// Neighbouring rows that one item takes where there are enough; see pkl.cpp.
constexpr int64_t row_group = 8;

int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

std::vector<int32_t> tokens_of_events(const PieceSide& side, int32_t events) {
    std::vector<int32_t> count(static_cast<size_t>(events), 0);
    for (int32_t id = 0; id < side.size; ++id) ++count[side.event[id]];
    return count;
}

}  // namespace

ListsView PrefixPlan::Lists::view() const {
    return {static_cast<int64_t>(start.size()) - 1, start.data(), tokens.data(), lanes.data()};
}

std::vector<int32_t> PrefixPlan::lay_out(const PieceSide& side, std::vector<int32_t>& number, Lists& lists) {
    std::vector<std::vector<int32_t>> tokens(number.size());
    for (int32_t id = 0; id < side.size; ++id) {
        if (number[side.event[id]] >= 0) tokens[side.event[id]].push_back(id);
    }
    std::vector<int32_t> order;
    for (size_t e = 0; e < number.size(); ++e) {
        if (number[e] >= 0) order.push_back(static_cast<int32_t>(e));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return tokens[a].size() > tokens[b].size(); });
    std::vector<int32_t> place(static_cast<size_t>(side.size), -1);
    for (size_t n = 0; n < order.size(); ++n) {
        const std::vector<int32_t>& list = tokens[order[n]];
        number[order[n]] = static_cast<int32_t>(n);
        const int64_t lane = static_cast<int64_t>(n) % lanes;
        if (lane == 0) {
            lists.start.push_back(lists.start.back() + static_cast<int64_t>(list.size()));
            lists.tokens.resize(lanes * lists.start.back(), 0);
            lists.lanes.resize(lists.start.back(), 0);
        }
        const int64_t begin = lists.start[lists.start.size() - 2];
        for (size_t i = 0; i < list.size(); ++i) {
            const int64_t row = begin + static_cast<int64_t>(i);
            place[list[i]] = static_cast<int32_t>(lanes * row + lane);
            lists.tokens[lanes * row + lane] = list[i];
            ++lists.lanes[row];
        }
    }
    for (int32_t& at : place) at = at < 0 ? static_cast<int32_t>(lanes * lists.start.back()) : at;
    return place;
}

PrefixPlan::PrefixPlan(std::vector<int32_t> data)
    : data_(std::move(data)), index_(PieceIndex::view(data_.data(), data_.size(), true)) {
    const auto& [student, teacher] = index_.side;
    const std::vector<int32_t> students = tokens_of_events(student, index_.events);
    const std::vector<int32_t> teachers = tokens_of_events(teacher, index_.events);
    std::vector<int32_t> teacher_token(students.size(), 0);
    for (int32_t id = 0; id < teacher.size; ++id) teacher_token[teacher.event[id]] = id;

    std::vector<int32_t> student_number(students.size(), -1);
    for (size_t e = 0; e < students.size(); ++e) {
        const bool shared = students[e] > 0 && teachers[e] > 0;
        if (shared && (students[e] > 1 || teachers[e] > 1)) student_number[e] = 0;
    }
    std::vector<int32_t> teacher_number = student_number;
    events_ = std::count(student_number.begin(), student_number.end(), 0);
    const std::vector<int32_t> place = lay_out(student, student_number, student_);
    lay_out(teacher, teacher_number, teacher_);
    teacher_list_.assign(padded(events_), 0);
    for (size_t e = 0; e < students.size(); ++e) {
        if (student_number[e] >= 0) teacher_list_[student_number[e]] = teacher_number[e];
    }

    partner_.assign(padded(student.size), 0);
    paired_bits_.assign(padded(student.size) / lanes, 0);
    for (int32_t id = 0; id < student.size; ++id) {
        const int32_t event = student.event[id];
        if (students[event] == 1 && teachers[event] == 1) {
            partner_[id] = teacher_token[event];
            paired_bits_[id / lanes] |= static_cast<uint16_t>(1u << id % lanes);
        } else {
            other_place_.push_back(place[id]);
        }
    }
    others_ = static_cast<int64_t>(other_place_.size());
    other_place_.resize(padded(others_), 0);
    partner_run_ = find_runs(partner_, paired_bits_);
    for (int32_t& run : partner_run_) run = run + lanes <= teacher.size ? run : -1;  // a load of 16 would leave the row
}

PrefixPlanView PrefixPlan::view() const {
    return {partner_.data(), partner_run_.data(),  paired_bits_.data(), events_, student_.view(),
            teacher_.view(), teacher_list_.data(), other_place_.data(), others_};
}

int64_t prefix_workspace(const PrefixParams& params) {
    const PrefixPlanView& plan = params.plan;
    const int64_t widest = std::max(params.student.width, params.teacher.width);
    const int64_t teachers = plan.teacher.slices == 0 ? 0 : plan.teacher.start[1];  // the first slice is the longest
    const int64_t at_start = lanes * (plan.student.start[plan.student.slices] + 1 + teachers) +
                             7 * padded(plan.events) + padded(plan.others) + lanes;
    const int64_t inside = 7 * padded(params.most + 1) + 3 * padded(params.most);
    const int64_t row = 3 * padded(params.student.width) + 2 * padded(widest) / lanes;
    return 4 * (at_start + inside + row) + 64 * 32;
}

void prefix(PrefixParams params, Level level, int threads) {
    const std::vector<InnerBoundary> boundaries = inner_boundaries(
        params.index, static_cast<size_t>(params.chunks),
        {params.student_rows.start, params.student_rows.count, params.student_rows.next, params.student.rows()},
        {params.teacher_rows.start, params.teacher_rows.count, params.teacher_rows.next, params.teacher.rows()});
    std::vector<int64_t> first_boundary(params.chunks + 1, 0);
    params.most = 0;
    for (const InnerBoundary& boundary : boundaries) {
        ++first_boundary[boundary.chunk + 1];
        params.most = std::max(params.most, boundary.last - boundary.first);
    }
    std::partial_sum(first_boundary.begin(), first_boundary.end(), first_boundary.begin());
    params.boundaries = boundaries.data();
    params.first_boundary = first_boundary.data();

    prefer_huge_pages(params.grad);
    std::vector<char> covered(params.student.rows(), 0);
    for (int64_t k = 0; k < params.chunks; ++k) {
        std::fill_n(covered.begin() + params.student_rows.start[k], params.student_rows.count[k], 1);
    }
    std::vector<int64_t> other_rows;
    for (int64_t r = 0; r < params.student.rows(); ++r) {
        if (!covered[r]) other_rows.push_back(r);
    }
    const CrossEntropyParams labels{params.student, params.grad, params.labels, params.lowest, false};
    const auto chunk = XTOKEN_PICK(level, prefix_chunk);
    const auto other = XTOKEN_PICK(level, cross_entropy_row);
    const auto others = static_cast<int64_t>(other_rows.size());
    const int64_t few = params.chunks / (8 * std::max(threads, 1));  // so that the threads end at about the same time
    const int64_t together = std::min(row_group, std::max<int64_t>(few, 1));
    const int64_t groups = (params.chunks + together - 1) / together;
    run_items(groups + (others + row_group - 1) / row_group, threads, [&](int64_t item, Scratch& scratch) {
        if (item >= groups) {
            const int64_t begin = (item - groups) * row_group;
            for (int64_t i = begin; i < std::min(others, begin + row_group); ++i) other(labels, other_rows[i]);
            return;
        }
        char* workspace = scratch.take<char>(prefix_workspace(params));
        const int64_t end = std::min(params.chunks, (item + 1) * together);
        for (int64_t k = item * together; k < end; ++k) chunk(params, k, workspace);
    });
}

}  // namespace xtoken::cpu
