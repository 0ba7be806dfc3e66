// Layouts of W, restricted to a set of teacher columns, for the P-KL kernel.
#include "cpu/plan.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace xtoken::cpu {
namespace {

constexpr int64_t lanes = 16;
// Rows whose weights sum to 1 up to the rounding of floats count as complete.
constexpr double complete = 2e-7;

int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

}  // namespace

std::vector<int32_t> find_runs(const std::vector<int32_t>& partners, const std::vector<uint16_t>& paired_bits) {
    std::vector<int32_t> runs(paired_bits.size(), -1);
    for (size_t k = 0; k < runs.size(); ++k) {
        const int32_t* partner = partners.data() + lanes * k;
        const uint32_t paired = paired_bits[k];
        int32_t begin = 0;
        bool run = true;
        for (int32_t i = lanes - 1; i >= 0; --i) {
            if ((paired >> i & 1u) != 0) begin = partner[i] - i;
        }
        for (int32_t i = 0; i < lanes; ++i) run = run && ((paired >> i & 1u) == 0 || partner[i] - i == begin);
        if (run && begin >= 0) runs[k] = begin;
    }
    return runs;
}

ColumnIndex::ColumnIndex(std::vector<int64_t> row_ptr, std::vector<int32_t> col, int64_t teacher_size)
    : row_ptr_(std::move(row_ptr)), col_(std::move(col)) {
    col_ptr_.assign(static_cast<size_t>(teacher_size) + 1, 0);
    for (const int32_t t : col_) {
        if (t < 0 || t >= teacher_size) value_error("col: expected ids below ", teacher_size, ", got ", t);
        ++col_ptr_[static_cast<size_t>(t) + 1];
    }
    for (size_t t = 1; t < col_ptr_.size(); ++t) col_ptr_[t] += col_ptr_[t - 1];
    entry_.resize(col_.size());
    row_.resize(col_.size());
    std::vector<int64_t> next(col_ptr_.begin(), col_ptr_.end() - 1);
    for (int64_t s = 0; s < student_size(); ++s) {
        for (int64_t e = row_ptr_[s]; e < row_ptr_[s + 1]; ++e) {
            const int64_t at = next[col_[e]]++;
            entry_[at] = static_cast<int32_t>(e);
            row_[at] = static_cast<int32_t>(s);
        }
    }
}

// Rows or columns, and their entries one list after the other.
struct Plan::Lists {
    std::vector<int32_t> owner, begin, place;
    std::vector<int32_t> index, entry;

    void clear() {
        for (auto* values : {&owner, &begin, &place, &index, &entry}) values->clear();
    }
    int64_t size() const { return static_cast<int64_t>(owner.size()); }
    int32_t count(int64_t i) const {
        return (i + 1 < size() ? begin[i + 1] : static_cast<int32_t>(index.size())) - begin[i];
    }
};

Plan::SumsLayout Plan::make_sums(Lists& lists, int32_t zero_slot, int32_t no_owner) {
    SumsLayout sums;
    sums.count = lists.size();
    // The place of each list when they are sorted by length, longest first, others in their order.
    int32_t longest = 0;
    for (int64_t i = 0; i < lists.size(); ++i) longest = std::max(longest, lists.count(i));
    std::vector<int32_t> next(static_cast<size_t>(longest) + 2, 0);
    for (int64_t i = 0; i < lists.size(); ++i) ++next[longest - lists.count(i) + 1];
    for (size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
    for (int64_t i = 0; i < lists.size(); ++i) lists.place.push_back(next[longest - lists.count(i)]++);

    const int64_t slices = padded(sums.count) / lanes;
    sums.start.assign(slices + 1, 0);
    for (int64_t i = 0; i < lists.size(); ++i) {
        if (lists.place[i] % lanes == 0) sums.start[lists.place[i] / lanes + 1] = lists.count(i);
    }
    for (int64_t k = 0; k < slices; ++k) sums.start[k + 1] += sums.start[k];
    sums.index.assign(lanes * sums.start.back(), zero_slot);
    sums.entry.assign(lanes * sums.start.back(), -1);
    sums.owner.assign(lanes * slices, no_owner);
    for (int64_t i = 0; i < lists.size(); ++i) {
        const int64_t base = lanes * sums.start[lists.place[i] / lanes] + lists.place[i] % lanes;
        for (int32_t n = 0; n < lists.count(i); ++n) {
            sums.index[base + lanes * n] = lists.index[lists.begin[i] + n];
            sums.entry[base + lanes * n] = lists.entry[lists.begin[i] + n];
        }
        sums.owner[lists.place[i]] = lists.owner[i];
    }
    return sums;
}

std::shared_ptr<const Plan::Layout> Plan::make_layout(const ColumnIndex& matrix, const float* weight,
                                                      std::vector<int32_t> chosen) {
    // Kept from call to call: most of the time would go into getting this memory from the system.
    static thread_local Lists lists, column_lists;
    static thread_local std::vector<int32_t> compact;    // student id -> compact row
    static thread_local std::vector<int32_t> column_of;  // teacher id -> compact column, or -1
    static thread_local std::vector<int32_t> u_at;       // compact column -> where its u is, or -1

    auto result = std::make_shared<Layout>();
    Layout& layout = *result;
    const bool all = chosen.empty();
    const int64_t students = matrix.student_size(), teachers = matrix.teacher_size();
    const int64_t columns = all ? teachers : static_cast<int64_t>(chosen.size());

    // The student ids that have an entry in the columns.
    int64_t entries = all ? matrix.entries() : 0;
    if (!all) {
        layout.active_bits.assign(padded(students) / lanes, 0);
        for (const int32_t t : chosen) {
            entries += matrix.col_ptr_[t + 1] - matrix.col_ptr_[t];
            for (int64_t i = matrix.col_ptr_[t]; i < matrix.col_ptr_[t + 1]; ++i) {
                layout.active_bits[matrix.row_[i] / lanes] |= static_cast<uint16_t>(1u << (matrix.row_[i] % lanes));
            }
        }
        compact.resize(students);
        for (int64_t s = 0; s < students; ++s) {
            if (layout.active_bits[s / lanes] == 0) {
                s |= lanes - 1;
            } else if ((layout.active_bits[s / lanes] >> (s % lanes) & 1u) != 0) {
                compact[s] = static_cast<int32_t>(layout.active.size());
                layout.active.push_back(static_cast<int32_t>(s));
            }
        }
    }
    const int64_t rows = all ? students : static_cast<int64_t>(layout.active.size());
    const auto row_zero = static_cast<int32_t>(padded(rows)), column_zero = static_cast<int32_t>(padded(columns));

    if (!all) {
        column_of.assign(teachers, -1);
        for (int64_t j = 0; j < columns; ++j) column_of[chosen[j]] = static_cast<int32_t>(j);
    }

    // Rows: entries in order of the column. Those of the other rows keep the column until its u has a place.
    lists.clear();
    u_at.assign(columns, -1);
    for (auto* values : {&layout.entry, &layout.entry_row, &layout.entry_u}) values->reserve(entries);
    layout.partner.assign(padded(rows), column_zero);
    layout.paired_bits.assign(padded(rows) / lanes, 0);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t s = all ? i : layout.active[i];
        const size_t begin = lists.index.size();
        for (int64_t e = matrix.row_ptr_[s]; e < matrix.row_ptr_[s + 1]; ++e) {
            const int32_t j = all ? matrix.col_[e] : column_of[matrix.col_[e]];
            if (j < 0) continue;
            lists.index.push_back(j);
            lists.entry.push_back(static_cast<int32_t>(e));
            layout.entry_row.push_back(static_cast<int32_t>(i));
            layout.entry_u.push_back(j);
            layout.entry.push_back(static_cast<int32_t>(e));
        }
        const size_t count = lists.index.size() - begin;
        if (count == 0) layout.empty.push_back(static_cast<int32_t>(i));
        if (count == 1 && weight[lists.entry.back()] == 1.0f) {
            const int32_t j = lists.index.back(), t = matrix.col_[lists.entry.back()];
            if (matrix.col_ptr_[t + 1] - matrix.col_ptr_[t] == 1) {
                u_at[j] = static_cast<int32_t>(i);
                layout.partner[i] = j;
                layout.paired_bits[i / lanes] |= static_cast<uint16_t>(1u << (i % lanes));
                layout.pair.push_back(lists.entry.back());
                lists.index.pop_back();
                lists.entry.pop_back();
                continue;
            }
        }
        if (count == 0) continue;
        lists.owner.push_back(static_cast<int32_t>(i));
        lists.begin.push_back(static_cast<int32_t>(begin));
    }
    layout.partner_run = find_runs(layout.partner, layout.paired_bits);

    // Columns: entries in order of the student.
    column_lists.clear();
    layout.empty_bits.assign(padded(columns) / lanes, 0);
    for (int64_t j = 0; j < columns; ++j) {
        const int64_t t = all ? j : chosen[j];
        const int64_t first = matrix.col_ptr_[t], count = matrix.col_ptr_[t + 1] - first;
        if (count == 0) layout.empty_bits[j / lanes] |= static_cast<uint16_t>(1u << (j % lanes));
        if (count == 0 || u_at[j] >= 0) continue;
        column_lists.owner.push_back(static_cast<int32_t>(j));
        column_lists.begin.push_back(static_cast<int32_t>(column_lists.index.size()));
        for (int64_t i = first; i < first + count; ++i) {
            column_lists.index.push_back(all ? matrix.row_[i] : compact[matrix.row_[i]]);
            column_lists.entry.push_back(matrix.entry_[i]);
        }
    }
    layout.column_sums = make_sums(column_lists, row_zero, column_zero);
    for (int64_t n = 0; n < layout.column_sums.count; ++n) {
        u_at[layout.column_sums.owner[n]] = static_cast<int32_t>(row_zero + lanes + n);
    }

    for (auto* places : {&lists.index, &layout.entry_u}) {
        for (int32_t& place : *places) place = u_at[place];
    }
    layout.row_sums = make_sums(lists, row_zero, row_zero);

    if (!all) chosen.resize(padded(columns), chosen.front());
    layout.chosen = std::move(chosen);
    layout.student_size = students;
    layout.teacher_size = teachers;
    layout.rows = rows;
    layout.columns = columns;
    return result;
}

SumsView Plan::Sums::view(const SumsLayout& layout) const {
    return {static_cast<int64_t>(layout.start.size()) - 1,
            layout.start.data(),
            layout.index.data(),
            weight.data(),
            layout.owner.data(),
            remainder.data()};
}

Plan::Sums Plan::weigh(const SumsLayout& layout, const float* weight) {
    Sums sums;
    sums.weight.resize(layout.entry.size());
    sums.remainder.assign(padded(layout.count), 0.0f);
    for (int64_t n = 0; n < layout.count; ++n) {
        const int64_t k = n / lanes;
        double total = 0;
        for (int64_t i = lanes * layout.start[k] + n % lanes; i < lanes * layout.start[k + 1]; i += lanes) {
            if (layout.entry[i] < 0) break;
            sums.weight[i] = weight[layout.entry[i]];
            total += static_cast<double>(sums.weight[i]);
        }
        sums.remainder[n] = static_cast<float>(1 - total);
    }
    return sums;
}

Plan::Plan(std::shared_ptr<const Layout> shared, const float* weight) : layout_(std::move(shared)) {
    const Layout& layout = *layout_;
    column_sums_ = weigh(layout.column_sums, weight);
    row_sums_ = weigh(layout.row_sums, weight);
    row_weight_.assign(padded(layout.rows), 0.0f);
    size_t next = 0;
    for (int64_t i = 0; i < layout.rows; ++i) {
        double total = 0;
        for (; next < layout.entry.size() && layout.entry_row[next] == i; ++next) {
            total += static_cast<double>(weight[layout.entry[next]]);
        }
        row_weight_[i] = static_cast<float>(total);
        if (std::abs(1 - total) > complete) deficient_.push_back(static_cast<int32_t>(i));
    }

    const bool all = layout.chosen.empty();
    view_.student_size = layout.student_size;
    view_.teacher_size = layout.teacher_size;
    view_.rows = layout.rows;
    view_.columns = layout.columns;
    view_.active_bits = all ? nullptr : layout.active_bits.data();
    view_.chosen = all ? nullptr : layout.chosen.data();
    view_.partner = layout.partner.data();
    view_.partner_run = layout.partner_run.data();
    view_.paired_bits = layout.paired_bits.data();
    view_.empty_bits = layout.empty_bits.data();
    view_.column_sums = column_sums_.view(layout.column_sums);
    view_.row_sums = row_sums_.view(layout.row_sums);
    view_.row_weight = row_weight_.data();
    view_.deficient = deficient_.data();
    view_.num_deficient = static_cast<int64_t>(deficient_.size());
    view_.empty = layout.empty.data();
    view_.num_empty = static_cast<int64_t>(layout.empty.size());
    view_.entry_row = layout.entry_row.data();
    view_.entry_u = layout.entry_u.data();
    view_.entries = static_cast<int64_t>(layout.entry_row.size());
}

Plan::Plan(const ColumnIndex& matrix, const float* weight, std::vector<int32_t> chosen)
    : Plan(make_layout(matrix, weight, std::move(chosen)), weight) {}

Plan Plan::reweighted(const ColumnIndex& matrix, const float* weight) const {
    const std::vector<int32_t>& pairs = layout_->pair;
    if (std::all_of(pairs.begin(), pairs.end(), [=](int32_t e) { return weight[e] == 1.0f; })) {
        return Plan(layout_, weight);
    }
    const std::vector<int32_t>& chosen = layout_->chosen;
    return Plan(matrix, weight, {chosen.begin(), chosen.empty() ? chosen.end() : chosen.begin() + layout_->columns});
}

}  // namespace xtoken::cpu
