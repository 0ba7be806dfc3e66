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

ColumnIndex::ColumnIndex(SparseRows matrix, int64_t teacher_size) : rows_(std::move(matrix)) {
    col_ptr_.assign(static_cast<size_t>(teacher_size) + 1, 0);
    for (const int32_t t : rows_.col) {
        if (t < 0 || t >= teacher_size) value_error("col: expected ids below ", teacher_size, ", got ", t);
        ++col_ptr_[static_cast<size_t>(t) + 1];
    }
    for (size_t t = 1; t < col_ptr_.size(); ++t) col_ptr_[t] += col_ptr_[t - 1];
    entry_.resize(rows_.col.size());
    row_.resize(rows_.col.size());
    std::vector<int64_t> next(col_ptr_.begin(), col_ptr_.end() - 1);
    for (int64_t s = 0; s < student_size(); ++s) {
        for (int64_t e = rows_.row_ptr[s]; e < rows_.row_ptr[s + 1]; ++e) {
            const int64_t at = next[rows_.col[e]]++;
            entry_[at] = e;
            row_[at] = static_cast<int32_t>(s);
        }
    }
}

SumsView Plan::Sums::view() const {
    return {static_cast<int64_t>(start.size()) - 1, start.data(), index.data(), weight.data(), remainder.data()};
}

Plan::Sums Plan::make_sums(std::vector<List>& lists, const std::vector<int32_t>& index,
                           const std::vector<float>& weight, int32_t zero_slot, int32_t first_slot,
                           std::vector<int32_t>& source) {
    std::stable_sort(lists.begin(), lists.end(), [](const List& a, const List& b) { return a.count > b.count; });
    const auto count = static_cast<int64_t>(lists.size());
    const int64_t slices = padded(count) / lanes;
    Sums sums;
    sums.start.push_back(0);
    for (int64_t k = 0; k < slices; ++k) sums.start.push_back(sums.start.back() + lists[k * lanes].count);
    sums.index.assign(lanes * sums.start.back(), zero_slot);
    sums.weight.assign(lanes * sums.start.back(), 0.0f);
    sums.remainder.assign(lanes * slices, 0.0f);
    for (int64_t n = 0; n < count; ++n) {
        const List& list = lists[n];
        const int64_t base = lanes * sums.start[n / lanes] + n % lanes;
        double total = 0;
        for (int32_t i = 0; i < list.count; ++i) {
            sums.index[base + lanes * i] = index[list.begin + i];
            sums.weight[base + lanes * i] = weight[list.begin + i];
            total += static_cast<double>(weight[list.begin + i]);
        }
        sums.remainder[n] = static_cast<float>(1 - total);
        source[list.owner] = first_slot + static_cast<int32_t>(n);
    }
    return sums;
}

Plan::Plan(const ColumnIndex& matrix, std::vector<int32_t> chosen) : chosen_(std::move(chosen)) {
    const SparseRows& W = matrix.rows_;
    const bool all = chosen_.empty();
    const int64_t students = matrix.student_size(), teachers = matrix.teacher_size();
    const int64_t columns = all ? teachers : static_cast<int64_t>(chosen_.size());

    // The student ids that have an entry in the columns.
    std::vector<int32_t> compact;  // student id -> compact row
    if (!all) {
        active_bits_.assign(padded(students) / lanes, 0);
        for (const int32_t t : chosen_) {
            for (int64_t i = matrix.col_ptr_[t]; i < matrix.col_ptr_[t + 1]; ++i) {
                active_bits_[matrix.row_[i] / lanes] |= static_cast<uint16_t>(1u << (matrix.row_[i] % lanes));
            }
        }
        compact.resize(students);
        for (int64_t s = 0; s < students; ++s) {
            if (active_bits_[s / lanes] == 0) {
                s |= lanes - 1;
            } else if ((active_bits_[s / lanes] >> (s % lanes) & 1u) != 0) {
                compact[s] = static_cast<int32_t>(active_.size());
                active_.push_back(static_cast<int32_t>(s));
            }
        }
    }
    const int64_t rows = all ? students : static_cast<int64_t>(active_.size());

    // Columns: entries in order of the student.
    std::vector<List> lists;
    std::vector<int32_t> index;
    std::vector<float> weight;
    const auto row_zero = static_cast<int32_t>(padded(rows)), column_zero = static_cast<int32_t>(padded(columns));
    column_source_.assign(padded(columns), row_zero);
    for (int64_t j = 0; j < columns; ++j) {
        const int64_t t = all ? j : chosen_[j];
        const int64_t first = matrix.col_ptr_[t], count = matrix.col_ptr_[t + 1] - first;
        const auto row_at = [&](int64_t i) { return all ? matrix.row_[i] : compact[matrix.row_[i]]; };
        if (count == 0) continue;
        if (count == 1 && W.weight[matrix.entry_[first]] == 1.0f) {
            column_source_[j] = row_at(first);
            continue;
        }
        lists.push_back({static_cast<int32_t>(j), static_cast<int64_t>(index.size()), static_cast<int32_t>(count)});
        for (int64_t i = first; i < first + count; ++i) {
            index.push_back(row_at(i));
            weight.push_back(W.weight[matrix.entry_[i]]);
        }
    }
    column_sums_ = make_sums(lists, index, weight, row_zero, row_zero + lanes, column_source_);

    // Rows: entries in order of the column.
    std::vector<int32_t> column_of;  // teacher id -> compact column, or -1
    if (!all) {
        column_of.assign(teachers, -1);
        for (int64_t j = 0; j < columns; ++j) column_of[chosen_[j]] = static_cast<int32_t>(j);
    }
    lists.clear();
    index.clear();
    weight.clear();
    row_source_.assign(padded(rows), column_zero);
    row_weight_.assign(padded(rows), 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t s = all ? i : active_[i];
        const auto begin = static_cast<int64_t>(index.size());
        double total = 0;
        for (int64_t e = W.row_ptr[s]; e < W.row_ptr[s + 1]; ++e) {
            const int32_t j = all ? W.col[e] : column_of[W.col[e]];
            if (j < 0) continue;
            index.push_back(j);
            weight.push_back(W.weight[e]);
            entry_row_.push_back(static_cast<int32_t>(i));
            entry_column_.push_back(j);
            total += static_cast<double>(W.weight[e]);
        }
        const auto count = static_cast<int32_t>(static_cast<int64_t>(index.size()) - begin);
        if (count == 0) empty_.push_back(static_cast<int32_t>(i));
        row_weight_[i] = static_cast<float>(total);
        if (std::abs(1 - total) > complete) deficient_.push_back(static_cast<int32_t>(i));
        if (count == 1 && weight.back() == 1.0f) {
            row_source_[i] = index.back();
            index.pop_back();
            weight.pop_back();
        } else {
            lists.push_back({static_cast<int32_t>(i), begin, count});
        }
    }
    row_sums_ = make_sums(lists, index, weight, column_zero, column_zero + lanes, row_source_);

    chosen_.resize(all ? 0 : padded(columns), all ? 0 : chosen_.front());
    view_.student_size = students;
    view_.teacher_size = teachers;
    view_.rows = rows;
    view_.columns = columns;
    view_.active_bits = all ? nullptr : active_bits_.data();
    view_.chosen = all ? nullptr : chosen_.data();
    view_.column_source = column_source_.data();
    view_.row_source = row_source_.data();
    view_.column_sums = column_sums_.view();
    view_.row_sums = row_sums_.view();
    view_.row_weight = row_weight_.data();
    view_.deficient = deficient_.data();
    view_.num_deficient = static_cast<int64_t>(deficient_.size());
    view_.empty = empty_.data();
    view_.num_empty = static_cast<int64_t>(empty_.size());
    view_.entry_row = entry_row_.data();
    view_.entry_column = entry_column_.data();
    view_.entries = static_cast<int64_t>(entry_row_.size());
}

}  // namespace xtoken::cpu
