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

void set_bit(std::vector<uint16_t>& bits, int32_t id) { bits[id / lanes] |= static_cast<uint16_t>(1u << id % lanes); }

}  // namespace

StartView PrefixPlan::Start::view() const {
    const ListsView lists{static_cast<int64_t>(start.size()) - 1, start.data(), tokens.data(), lanes.data()};
    return {lists, absent.data(), absent_bits.data(), absent_count, paired_bits.data()};
}

std::vector<int32_t> PrefixPlan::lay_out(const PieceSide& side, const std::vector<Kind>& kinds, Start& out) {
    out.absent_bits.assign(padded(side.size) / lanes, 0);
    out.paired_bits = out.absent_bits;
    std::vector<std::vector<int32_t>> lists(kinds.size());
    std::vector<int32_t> order;  // events in the order of their first tokens, so that neighbours are read together
    for (int32_t id = 0; id < side.size; ++id) {
        const int32_t event = side.event[id];
        if (kinds[event] == Kind::pair) {
            set_bit(out.paired_bits, id);
        } else if (kinds[event] == Kind::absent) {
            set_bit(out.absent_bits, id);
            out.absent.push_back(id);
        } else {
            if (lists[event].empty()) order.push_back(event);
            lists[event].push_back(id);
        }
    }
    out.absent_count = static_cast<int64_t>(out.absent.size());
    out.absent.resize(padded(out.absent_count), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return lists[a].size() > lists[b].size(); });
    std::vector<int32_t> number(kinds.size(), 0);
    for (size_t n = 0; n < order.size(); ++n) {
        const std::vector<int32_t>& list = lists[order[n]];
        number[order[n]] = static_cast<int32_t>(n);
        const int64_t lane = static_cast<int64_t>(n) % lanes;
        if (lane == 0) {
            out.start.push_back(out.start.back() + static_cast<int64_t>(list.size()));
            out.tokens.resize(lanes * out.start.back(), 0);
            out.lanes.resize(out.start.back(), 0);
        }
        const int64_t begin = out.start[out.start.size() - 2];
        for (size_t i = 0; i < list.size(); ++i) {
            const int64_t row = begin + static_cast<int64_t>(i);
            out.tokens[lanes * row + lane] = list[i];
            ++out.lanes[row];
        }
    }
    return number;
}

PrefixPlan::PrefixPlan(std::vector<int32_t> data)
    : data_(std::move(data)), index_(PieceIndex::view(data_.data(), data_.size(), true)) {
    const auto& [student, teacher] = index_.side;
    const std::vector<int32_t> students = tokens_of_events(student, index_.events);
    const std::vector<int32_t> teachers = tokens_of_events(teacher, index_.events);
    std::vector<Kind> kinds(students.size(), Kind::absent);
    for (size_t e = 0; e < kinds.size(); ++e) {
        if (students[e] == 0 || teachers[e] == 0) continue;
        kinds[e] = students[e] == 1 && teachers[e] == 1 ? Kind::pair : Kind::list;
    }
    events_ = std::count(kinds.begin(), kinds.end(), Kind::list);
    const std::vector<int32_t> student_number = lay_out(student, kinds, student_);
    const std::vector<int32_t> teacher_number = lay_out(teacher, kinds, teacher_);
    teacher_list_.assign(padded(events_), 0);
    std::vector<int32_t> teacher_token(kinds.size(), 0);
    for (size_t e = 0; e < kinds.size(); ++e) {
        if (kinds[e] == Kind::list) teacher_list_[student_number[e]] = teacher_number[e];
    }
    for (int32_t id = 0; id < teacher.size; ++id) teacher_token[teacher.event[id]] = id;
    partner_.assign(padded(student.size), static_cast<int32_t>(padded(teacher.size)));
    for (int32_t id = 0; id < student.size; ++id) {
        const int32_t event = student.event[id];
        if (kinds[event] == Kind::pair) {
            partner_[id] = teacher_token[event];
        } else {
            other_list_.push_back(kinds[event] == Kind::list ? student_number[event]
                                                             : static_cast<int32_t>(padded(events_)));
        }
    }
    others_ = static_cast<int64_t>(other_list_.size());
    other_list_.resize(padded(others_), 0);
    partner_run_ = find_runs(partner_, student_.paired_bits);
}

PrefixPlanView PrefixPlan::view() const {
    return {partner_.data(), partner_run_.data(),  student_.view(),    teacher_.view(),
            events_,         teacher_list_.data(), other_list_.data(), others_};
}

int64_t prefix_workspace(const PrefixParams& params) {
    const PrefixPlanView& plan = params.plan;
    const int64_t students = padded(params.student.width), teachers = padded(params.teacher.width) + lanes;
    const auto longest = [](const ListsView& lists) { return lists.slices == 0 ? 0 : lists.start[1]; };
    const int64_t start = 2 * students + teachers + 2 * padded(plan.events) + padded(plan.others) + 2 * lanes +
                          lanes * std::max(longest(plan.student.lists), longest(plan.teacher.lists));
    const int64_t inside = 7 * padded(params.most + 1) + 3 * padded(params.most);
    const int64_t row = students + 2 * std::max(students, teachers) / lanes;
    return 4 * (start + inside + row) + 64 * 32;
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
