// Bindings of core/align_dp.h and core/align_table.h on bare tokens, for tests and benchmarks.
#include "core/align_dp.h"

#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "bindings/arrays.h"
#include "core/align_table.h"

namespace xtoken {
namespace {

using Tokens = std::vector<std::string>;
using Flags = std::optional<std::vector<bool>>;

// One side: its distinct tokens as a vocabulary, the flagged ones special, and the sequence as ids of it.
struct Side {
    Side(const char* name, const Tokens& tokens, const Flags& special) {
        if (special && special->size() != tokens.size()) {
            value_error(name, ": expected ", tokens.size(), " flags, got ", special->size());
        }
        std::map<std::pair<std::string, bool>, int32_t> known;
        for (size_t x = 0; x < tokens.size(); ++x) {
            const bool is_special = special && (*special)[x];
            const auto [entry, is_new] = known.emplace(std::pair(tokens[x], is_special), known.size());
            if (is_new) {
                texts.push_back(tokens[x]);
                kinds.push_back(is_special ? TokenKind::special : TokenKind::normal);
            }
            ids.push_back(entry->second);
        }
    }
    Vocabulary vocabulary() const { return {texts, kinds, {}}; }

    Tokens texts;
    std::vector<TokenKind> kinds;
    std::vector<int32_t> ids;
};

struct BarePair {
    BarePair(const Side& student_side, const Side& teacher_side)
        : pair(student_side.vocabulary(), teacher_side.vocabulary(), CanonicalRules{}) {
        for (const int32_t id : student_side.ids) student.push_back(pair.student_symbol(id));
        for (const int32_t id : teacher_side.ids) teacher.push_back(pair.teacher_symbol(id));
    }
    int32_t n() const { return static_cast<int32_t>(student.size()); }
    int32_t m() const { return static_cast<int32_t>(teacher.size()); }

    TokenPair pair;
    std::vector<int32_t> student, teacher;
};

py::array_t<uint8_t> rows_of(std::vector<dp::Move>&& moves) {
    static_assert(sizeof(dp::Move) == 3, "a move is a row of three bytes");
    return to_array<uint8_t>(std::move(moves), 3);
}

}  // namespace

void bind_align_dp(py::module_& m) {
    py::class_<DpLimits>(m, "DpLimits")
        .def(py::init<>())
        .def_readwrite("cell_budget", &DpLimits::cell_budget)
        .def_readwrite("window_edges", &DpLimits::window_edges)
        .def_readwrite("all_ties", &DpLimits::all_ties)
        .def_readwrite("plain_cells", &DpLimits::plain_cells)
        .def_readwrite("first_slack", &DpLimits::first_slack)
        .def_readwrite("slack_growth", &DpLimits::slack_growth)
        .def_readwrite("plain_share", &DpLimits::plain_share)
        .def_readwrite("row_bytes", &DpLimits::row_bytes);

    m.def(
        "dp_moves",
        [](const Tokens& student_tokens, const Tokens& teacher_tokens, const Flags& student_special,
           const Flags& teacher_special, const DpLimits& limits) {
            const BarePair tokens(Side("student_special", student_tokens, student_special),
                                  Side("teacher_special", teacher_tokens, teacher_special));
            std::vector<dp::Move> moves;
            DpOutcome outcome;
            {
                py::gil_scoped_release release;
                outcome = align_dp(tokens.pair, tokens.student.data(), tokens.n(), tokens.teacher.data(), tokens.m(),
                                   limits, moves);
            }
            const double score = 1.5 * static_cast<double>(int64_t{tokens.n()} + tokens.m() - outcome.cost);
            return py::make_tuple(rows_of(std::move(moves)), score, outcome.optimal, outcome.cells);
        },
        py::arg("student_tokens"), py::arg("teacher_tokens"), py::arg("student_special") = py::none(),
        py::arg("teacher_special") = py::none(), py::arg_v("limits", DpLimits{}, "DpLimits()"),
        "Moves as rows (student tokens, teacher tokens, equal), score, whether it is optimal, table cells.");

    m.def(
        "table_moves",
        [](const Tokens& student_tokens, const Tokens& teacher_tokens, const Flags& student_special,
           const Flags& teacher_special) {
            const BarePair tokens(Side("student_special", student_tokens, student_special),
                                  Side("teacher_special", teacher_tokens, teacher_special));
            std::vector<dp::Move> moves;
            const double score =
                align_table(tokens.pair, tokens.student.data(), tokens.n(), tokens.teacher.data(), tokens.m(), moves);
            return py::make_tuple(rows_of(std::move(moves)), score);
        },
        py::arg("student_tokens"), py::arg("teacher_tokens"), py::arg("student_special") = py::none(),
        py::arg("teacher_special") = py::none(), "Moves and score by the definition, the whole table.");
}

}  // namespace xtoken
