// Layouts of W, restricted to a set of teacher columns, for the P-KL kernel.
#include "losses/pkl/cpu_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/sliced.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "launch/arguments.h"

namespace xtoken::cpu {
namespace {

// Rows whose weights sum to 1 up to the rounding of floats count as complete.
constexpr double complete = 2e-7;
// So many rows are sorted by the length of their sums: what is written together is near each other, in the L1 cache.
constexpr int64_t row_window = 1024;

// Where a matrix has entries, in compressed rows and in compressed columns.
struct PklMatrix {
    static constexpr const char* kind = "pkl_matrix";

    PklMatrix(const Values<int64_t>& row_ptr, const Values<int32_t>& col, int64_t teacher_size);

    int64_t student_size() const { return static_cast<int64_t>(row_ptr_.size()) - 1; }
    int64_t teacher_size() const { return static_cast<int64_t>(col_ptr_.size()) - 1; }
    int64_t entries() const { return static_cast<int64_t>(col_.size()); }

    std::vector<int64_t> row_ptr_;  // [student_size + 1]
    std::vector<int32_t> col_;      // [entries]
    std::vector<int64_t> col_ptr_;  // [teacher_size + 1]
    std::vector<int32_t> entry_;    // [entries] positions in col_, by column
    std::vector<int32_t> row_;      // [entries] their rows
};

// A layout that depends on where W has entries (and which of them are alone and weigh 1), and the weights in it.
class PklPlan : public PklPlanView {
  public:
    // For all columns (`chosen` empty), or for these: ascending, distinct. `weight` [matrix.entries()].
    PklPlan(const PklMatrix& matrix, const float* weight, std::vector<int32_t> chosen);
    PklPlan(const PklPlan&) = delete;
    PklPlan& operator=(const PklPlan&) = delete;

    // The same columns with other weights; shares the layout, if the entries that have to weigh 1 still do.
    std::shared_ptr<const PklPlan> reweighted(const PklMatrix& matrix, const float* weight) const;

  private:
    // Of sums, in the order of SumsView; entries are positions in W, -1 where a sum is filled up.
    struct SumsLayout {
        int64_t count = 0;
        std::vector<int64_t> start;
        std::vector<int32_t> index, entry, owner;
    };
    struct Layout {
        std::vector<int32_t> chosen, active, partner, partner_run, empty, entry, entry_row, entry_u;
        std::vector<uint16_t> active_bits, paired_bits, empty_bits;
        std::vector<int32_t> pair;  // entries of pairs: they weigh 1
        SumsLayout column_sums, row_sums;
        int64_t student_size, teacher_size, rows, columns;
    };
    // Rows or columns, and their entries one list after the other.
    struct Lists {
        std::vector<int32_t> owner, count;
        std::vector<int32_t> index, entry;

        void clear() {
            for (auto* values : {&owner, &count, &index, &entry}) values->clear();
        }
    };
    struct Sums {
        std::vector<float> weight, remainder;
        SumsView view(const SumsLayout& layout) const;
    };

    PklPlan(std::shared_ptr<const Layout> layout, const float* weight);
    static std::shared_ptr<const Layout> make_layout(const PklMatrix& matrix, const float* weight,
                                                     std::vector<int32_t> chosen);
    // Sorted by length among `window` lists, a multiple of 16.
    static SumsLayout make_sums(const Lists& lists, int64_t window, int32_t zero_slot, int32_t no_owner);
    static Sums weigh(const SumsLayout& layout, const float* weight);

    std::shared_ptr<const Layout> layout_;
    std::vector<float> row_weight_;
    std::vector<int32_t> deficient_;
    Sums column_sums_, row_sums_;
};

PklMatrix::PklMatrix(const Values<int64_t>& row_ptr, const Values<int32_t>& col, int64_t teacher_size)
    : row_ptr_(row_ptr.data, row_ptr.data + row_ptr.size), col_(col.data, col.data + col.size) {
    if (row_ptr_.empty() || row_ptr_.front() != 0 || row_ptr_.back() != entries()) {
        value_error("row_ptr: expected 0 ... ", entries(), " (the number of entries of col)");
    }
    if (!std::is_sorted(row_ptr_.begin(), row_ptr_.end())) value_error("row_ptr: expected a non-decreasing sequence");
    if (teacher_size < 0 || teacher_size > std::numeric_limits<int32_t>::max() ||
        std::max(student_size(), entries()) > std::numeric_limits<int32_t>::max()) {
        value_error("matrix: expected rows, columns and entries that int32 can number");
    }
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

PklPlan::SumsLayout PklPlan::make_sums(const Lists& lists, int64_t window, int32_t zero_slot, int32_t no_owner) {
    const auto count = static_cast<int64_t>(lists.count.size());
    SumsLayout sums;
    sums.count = count;
    sums.start.push_back(0);
    int64_t begin = 0;
    for (int64_t from = 0; from < count; from += window) {
        const auto first = lists.count.begin() + from;
        const SlicedLists sliced({first, first + std::min(window, count - from)}, lanes);
        const int64_t base = lanes * sums.start.back();
        sums.index.resize(base + sliced.size(), zero_slot);
        sums.entry.resize(base + sliced.size(), -1);
        sums.owner.resize(from + lanes * sliced.slices(), no_owner);
        for (int64_t list = 0; list < sliced.lists(); ++list) {
            sliced.each_entry(list, first[list], [&](int64_t at, int64_t i) {
                sums.index[base + at] = lists.index[begin + i];
                sums.entry[base + at] = lists.entry[begin + i];
            });
            begin += first[list];
            sums.owner[from + sliced.place[list]] = lists.owner[from + list];
        }
        for (int64_t k = 0; k < sliced.slices(); ++k) sums.start.push_back(base / lanes + sliced.start[k + 1]);
    }
    return sums;
}

std::shared_ptr<const PklPlan::Layout> PklPlan::make_layout(const PklMatrix& matrix, const float* weight,
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
        lists.count.push_back(static_cast<int32_t>(count));
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
        column_lists.count.push_back(static_cast<int32_t>(count));
        for (int64_t i = first; i < first + count; ++i) {
            column_lists.index.push_back(all ? matrix.row_[i] : compact[matrix.row_[i]]);
            column_lists.entry.push_back(matrix.entry_[i]);
        }
    }
    layout.column_sums = make_sums(column_lists, padded(columns) + lanes, row_zero, column_zero);
    for (int64_t n = 0; n < layout.column_sums.count; ++n) {
        u_at[layout.column_sums.owner[n]] = static_cast<int32_t>(row_zero + lanes + n);
    }

    for (auto* places : {&lists.index, &layout.entry_u}) {
        for (int32_t& place : *places) place = u_at[place];
    }
    layout.row_sums = make_sums(lists, row_window, row_zero, row_zero);

    if (!all) chosen.resize(padded(columns), chosen.front());
    layout.chosen = std::move(chosen);
    layout.student_size = students;
    layout.teacher_size = teachers;
    layout.rows = rows;
    layout.columns = columns;
    return result;
}

SumsView PklPlan::Sums::view(const SumsLayout& layout) const {
    return {static_cast<int64_t>(layout.start.size()) - 1,
            layout.start.data(),
            layout.index.data(),
            weight.data(),
            layout.owner.data(),
            remainder.data()};
}

PklPlan::Sums PklPlan::weigh(const SumsLayout& layout, const float* weight) {
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

PklPlan::PklPlan(std::shared_ptr<const Layout> shared, const float* weight)
    : PklPlanView{}, layout_(std::move(shared)) {
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
    student_size = layout.student_size;
    teacher_size = layout.teacher_size;
    rows = layout.rows;
    columns = layout.columns;
    active_bits = all ? nullptr : layout.active_bits.data();
    chosen = all ? nullptr : layout.chosen.data();
    partner = layout.partner.data();
    partner_run = layout.partner_run.data();
    paired_bits = layout.paired_bits.data();
    empty_bits = layout.empty_bits.data();
    column_sums = column_sums_.view(layout.column_sums);
    row_sums = row_sums_.view(layout.row_sums);
    row_weight = row_weight_.data();
    deficient = deficient_.data();
    num_deficient = static_cast<int64_t>(deficient_.size());
    empty = layout.empty.data();
    num_empty = static_cast<int64_t>(layout.empty.size());
    entry_row = layout.entry_row.data();
    entry_u = layout.entry_u.data();
    entries = static_cast<int64_t>(layout.entry_row.size());
}

PklPlan::PklPlan(const PklMatrix& matrix, const float* weight, std::vector<int32_t> chosen_columns)
    : PklPlan(make_layout(matrix, weight, std::move(chosen_columns)), weight) {}

std::shared_ptr<const PklPlan> PklPlan::reweighted(const PklMatrix& matrix, const float* weight) const {
    const std::vector<int32_t>& pairs = layout_->pair;
    if (std::all_of(pairs.begin(), pairs.end(), [=](int32_t e) { return weight[e] == 1.0f; })) {
        return std::shared_ptr<const PklPlan>(new PklPlan(layout_, weight));
    }
    const std::vector<int32_t>& all = layout_->chosen;
    std::vector<int32_t> those(all.begin(), all.empty() ? all.end() : all.begin() + columns);
    return std::make_shared<const PklPlan>(matrix, weight, std::move(those));
}

// ---- builders ----

struct MatrixParams {
#define XTOKEN_PKL_MATRIX(FIELD)                        \
    FIELD(Values<int64_t>, row_ptr, "[V_student + 1]"); \
    FIELD(Values<int32_t>, col, "[entries] of W");      \
    FIELD(int64_t, teacher_size, "V_teacher")
    XTOKEN_FIELDS(XTOKEN_PKL_MATRIX)
};

struct PlanParams {
#define XTOKEN_CPU_PKL_PLAN(FIELD)                                         \
    FIELD(const PklMatrix*, matrix, "W");                                  \
    FIELD(Values<float>, weight, "[entries] of W");                        \
    FIELD(Values<int32_t>, columns, "[C] ascending, distinct; null: all"); \
    FIELD(const PklPlanView*, like, "a plan for these columns with other weights; null: none")
    XTOKEN_FIELDS(XTOKEN_CPU_PKL_PLAN)
};

std::shared_ptr<const PklMatrix> build_matrix(const MatrixParams& params) {
    return std::make_shared<const PklMatrix>(params.row_ptr, params.col, params.teacher_size);
}

std::shared_ptr<const PklPlanView> build_plan(const PlanParams& params) {
    const auto& [columns, count] = params.columns;
    const int64_t entries = params.matrix->entries();
    for (int64_t j = 0; j < count; ++j) {
        if (columns[j] < (j == 0 ? 0 : columns[j - 1] + 1) || columns[j] >= params.matrix->teacher_size()) {
            value_error("columns: expected ascending ids below ", params.matrix->teacher_size(), ", got ", columns[j]);
        }
    }
    if (params.weight.size != entries) {
        value_error("weight: expected ", entries, " weights (the matrix's entries), got ", params.weight.size);
    }
    if (params.like != nullptr) {
        return static_cast<const PklPlan*>(params.like)->reweighted(*params.matrix, params.weight.data);
    }
    return std::make_shared<const PklPlan>(*params.matrix, params.weight.data,
                                           std::vector<int32_t>(columns, columns + count));
}

const Builder matrix_builder("pkl_matrix", &build_matrix);
const Builder plan_builder("pkl_plan", &build_plan);

}  // namespace
}  // namespace xtoken::cpu
