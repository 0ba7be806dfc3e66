// P-KL, forward and backward in one pass over each chunk: parameters of both backends.
#pragma once

#include "cpu/dispatch.h"
#include "launch/arguments.h"
#include "launch/divergence.h"
#include "losses/pkl/cpu_plan.h"

namespace xtoken {

enum class Merge { first, mean, chain };

inline Choices choices_of(Merge) {
    static constexpr const char* names[] = {"first", "mean", "chain"};
    return {names, 3};
}

#define XTOKEN_PKL(FIELD)                                                     \
    XTOKEN_CHUNKS(FIELD);                                                     \
    XTOKEN_DIVERGES(FIELD, "of the two distributions");                       \
    FIELD(Real*, losses, "[chunks] out");                                     \
    FIELD(Labels, labels, "of the student's rows");                           \
    FIELD(Merge, merge, "how the tokens of a chunk become one distribution"); \
    FIELD(Real, epsilon, "added to masses before divisions and logarithms")

namespace cpu {

struct PklParams {
#define XTOKEN_CPU_PKL(FIELD)                                                                \
    XTOKEN_PKL(FIELD);                                                                       \
    FIELD(double*, weight_grad, "[entries] out, by row of W then column; null: not wanted"); \
    FIELD(const PklPlanView*, plan, "W in the columns")
    XTOKEN_FIELDS(XTOKEN_CPU_PKL)
};

// Chunk k: its loss, and the gradient of its rows. `weight_sum` [plan.entries] is added to, unless null.
XTOKEN_KERNEL(void, pkl_chunk, (const PklParams& params, int64_t k, float* workspace, float* weight_sum))

}  // namespace cpu

namespace cuda {

// Weighted sums. The last `few` lists have up to four entries each, one list after the other behind the slices. All are
// filled up with entries of weight 0 that name some element.
struct SumLists {
#define XTOKEN_SUM_LISTS(FIELD)                                     \
    XTOKEN_LISTS(FIELD);                                            \
    FIELD(int32_t, few, "lists of up to four entries");             \
    FIELD(const int32_t*, index, "[32 * start[slices] + 4 * few]"); \
    FIELD(const float*, weight, "as index");                        \
    FIELD(const uint8_t*, wanted, "[count] sums that are needed; null: all")
    XTOKEN_FIELDS(XTOKEN_SUM_LISTS)
};

// W in the teacher columns C. Where C has all columns, most are one of a pair, a row and a column that have one entry,
// of weight 1, in common and no other: x is e there, and h is u. x and u of the other columns with entries are stored;
// of a chosen C those of all its columns. Sums of several entries are computed first, and put behind e and u, with a
// zero for what has no entries.
struct PklPlan {
#define XTOKEN_PKL_PLAN(FIELD)                                                                                  \
    FIELD(int32_t, students, "rows of W");                                                                      \
    FIELD(int32_t, teachers, "columns of W");                                                                   \
    FIELD(int32_t, columns, "stored ones");                                                                     \
    FIELD(const int32_t*, stored, "[columns] their teacher ids, distinct");                                     \
    FIELD(const int32_t*, count, "[] how many of them, from the first on, are the set; null: all");             \
    FIELD(const int32_t*, column_slot, "[columns] in (e [students], 0, sums of column_lists)");                 \
    FIELD(const int32_t*, row_slot,                                                                             \
          "[students] the column of a pair, or -1 - the slot in (u [columns], 0, sums of row_lists)");          \
    FIELD(const int32_t*, paired, "BitRow [students]: rows of pairs; null: there are none");                    \
    FIELD(int32_t, rest, "rows of no pair, 0 without pairs");                                                   \
    FIELD(const int32_t*, unpaired, "[rest] they; null: no pairs");                                             \
    FIELD(const int32_t*, empty, "BitRow [teachers]: columns without entries; null: C is what is stored");      \
    FIELD(SumLists, column_lists, "of student ids, or with pairs of places in `unpaired`");                     \
    FIELD(SumLists, row_lists, "of -1 - stored columns, or the zero behind them");                              \
    FIELD(const int64_t*, entry_row, "[entries] student ids of the entries in C; null: not wanted");            \
    FIELD(const int64_t*, entry_column, "[entries] stored columns, or the zero behind them; null: not wanted"); \
    FIELD(int64_t, entries, "how many")
    XTOKEN_FIELDS(XTOKEN_PKL_PLAN)
};

struct PklParams {
#define XTOKEN_CUDA_PKL(FIELD)                                                                           \
    XTOKEN_PKL(FIELD);                                                                                   \
    XTOKEN_QUEUE(FIELD);                                                                                 \
    FIELD(float*, weight_sums,                                                                           \
          "[blocks, entries] zeros, receives each block's part of the gradient of W; null: not wanted"); \
    FIELD(float*, workspace, "[blocks, workspace]; null: asked for");                                    \
    FIELD(PklPlan, plan, "W in the columns")
    XTOKEN_FIELDS(XTOKEN_CUDA_PKL)
};

}  // namespace cuda

}  // namespace xtoken
