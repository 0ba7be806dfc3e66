// The definition of the paper's alignment: the whole table, one cell at a time. The oracle of align_dp.
#include "core/align_table.h"

#include <algorithm>
#include <string_view>

namespace xtoken {
namespace {

using dp::Move;

// Whether the text symbol `whole` spells the `count` symbols at `parts`.
bool spells(const TokenPair& pair, int32_t whole, const int32_t* parts, int count) {
    if (pair.is_atomic(whole)) return false;
    std::string_view rest = pair.text(whole);
    for (int x = 0; x < count; ++x) {
        if (pair.is_atomic(parts[x])) return false;
        const std::string_view part = pair.text(parts[x]);
        if (rest.substr(0, part.size()) != part) return false;
        rest.remove_prefix(part.size());
    }
    return rest.empty();
}

}  // namespace

double align_table(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   std::vector<Move>& moves) {
    struct Cell {
        int32_t score;  // D, in units of 1.5
        Move last;
    };
    const int64_t width = int64_t{m} + 1;
    std::vector<Cell> table(static_cast<size_t>((int64_t{n} + 1) * width));
    const auto cell = [&](int32_t i, int32_t j) -> Cell& { return table[static_cast<size_t>(i * width + j)]; };

    for (int32_t i = 0; i <= n; ++i) {
        for (int32_t j = 0; j <= m; ++j) {
            if (i == 0 && j == 0) {
                cell(0, 0) = {0, {}};
                continue;
            }
            bool found = false;
            const auto offer = [&](Move move, int gain) {
                const int32_t score = cell(i - move.student, j - move.teacher).score + gain;
                if (!found || score > cell(i, j).score) cell(i, j) = {score, move};
                found = true;
            };
            if (i > 0 && j > 0) {
                const bool equal = student[i - 1] == teacher[j - 1];
                offer(equal ? dp::kMatch : dp::kMismatch, equal ? 2 : -2);
            }
            if (i > 0) offer(dp::kStudentGap, -1);
            if (j > 0) offer(dp::kTeacherGap, -1);
            if (i == 0 || j == 0) continue;
            for (int k = 2; k <= std::min(j, dp::kMaxRun); ++k) {
                if (spells(pair, student[i - 1], teacher + j - k, k)) offer(dp::one_to_many(k), k);
            }
            for (int k = 2; k <= std::min(i, dp::kMaxRun); ++k) {
                if (spells(pair, teacher[j - 1], student + i - k, k)) offer(dp::many_to_one(k), k);
            }
        }
    }

    const size_t first = moves.size();
    for (int32_t i = n, j = m; i > 0 || j > 0;) {
        const Move move = cell(i, j).last;
        moves.push_back(move);
        i -= move.student;
        j -= move.teacher;
    }
    std::reverse(moves.begin() + static_cast<std::ptrdiff_t>(first), moves.end());
    return 1.5 * cell(n, m).score;
}

}  // namespace xtoken
