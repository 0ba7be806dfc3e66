// The byte merge: cuts two token sequences of the same text at every boundary that both share, in linear time.
//
// At a common boundary the loop takes one token from each side and then keeps extending the side that is shorter, in
// bytes, until both end together: that is the finest chunk. The first differing byte abandons the chunk, and the
// disagreement begins at the last common boundary. To resume, `find_agreement` looks for the nearest pair of token
// boundaries from which the sides agree again; the nearer the pair, the fewer tokens it costs, so the search window
// grows by doubling and costs no more than a constant times the distance skipped.
#include "core/align_bytes.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

namespace xtoken {
namespace {

// Bytes that must agree for the sides to count as reading the same text again, `cost` tokens further on. A few are
// enough near the disagreement; farther away more are needed, since common words match there by chance.
constexpr size_t kMostEvidence = 16;
size_t evidence(int32_t cost) { return std::min(kMostEvidence, 2 + 2 * static_cast<size_t>(cost)); }
// Pairs of boundaries up to this cost are tried one by one; beyond, evidence is kMostEvidence and a sorted index of
// that many bytes finds them.
constexpr int32_t kNear = 7;
// Boundaries followed by equal bytes that are tried for one boundary of the other side (periodic text has many).
constexpr int kTries = 4;

class Side {
  public:
    Side(const TokenPair& pair, const int32_t* symbols, int32_t size) : pair_(pair), symbols_(symbols), size_(size) {}

    int32_t size() const { return size_; }
    int32_t symbol(int32_t i) const { return symbols_[i]; }
    bool is_atomic(int32_t i) const { return pair_.is_atomic(symbols_[i]); }
    std::string_view text(int32_t i) const { return pair_.text(symbols_[i]); }
    bool is_empty(int32_t i) const { return !is_atomic(i) && text(i).empty(); }
    bool begins_with_space(int32_t i) const { return !is_atomic(i) && text(i).front() == ' '; }

    // A hash of what follows boundary i: kMostEvidence bytes, or less before the end or an atomic token.
    uint64_t key(int32_t i) const {
        uint64_t key = 0;
        size_t taken = 0;
        for (; i < size_ && taken < kMostEvidence; ++i) {
            if (is_atomic(i)) return taken ? key : ~static_cast<uint64_t>(symbols_[i]);
            for (const char c : text(i).substr(0, kMostEvidence - taken)) {
                key = (key ^ static_cast<uint8_t>(c)) * 0x9E3779B97F4A7C15u;
                ++taken;
            }
        }
        return key;
    }

  private:
    const TokenPair& pair_;
    const int32_t* symbols_;
    int32_t size_;
};

// A cursor over one side's text from a boundary on.
struct Cursor {
    const Side& side;
    int32_t next;           // first token not yet taken
    std::string_view rest;  // what is left of the tokens taken

    // Takes the first token but for its first byte.
    void skip_byte() { rest = side.text(next++).substr(1); }
    // Makes `rest` non-empty if text follows before the end or an atomic token.
    bool fill() {
        while (rest.empty()) {
            if (next == side.size() || side.is_atomic(next)) return false;
            rest = side.text(next++);
        }
        return true;
    }
};

// Removes the longest common prefix of at most both rests; false if they differ within it.
bool take_common(Cursor& a, Cursor& b, size_t& taken) {
    taken = std::min(a.rest.size(), b.rest.size());
    if (std::memcmp(a.rest.data(), b.rest.data(), taken) != 0) return false;
    a.rest.remove_prefix(taken);
    b.rest.remove_prefix(taken);
    return true;
}

// Whether both sides agree from boundaries (i, j) on: over `enough` bytes, an equal atomic token, or to the end of a
// side.
bool agrees(const Side& first, const Side& second, int32_t i, int32_t j, size_t enough) {
    Cursor a{first, i, {}}, b{second, j, {}};
    for (size_t seen = 0, taken = 0; seen < enough; seen += taken) {
        const bool more_a = a.fill(), more_b = b.fill();
        if (more_a && more_b) {
            if (!take_common(a, b, taken)) return false;
            continue;
        }
        const bool end_a = !more_a && a.next == first.size(), end_b = !more_b && b.next == second.size();
        if (end_a || end_b) return seen > 0;
        return !more_a && !more_b && first.symbol(a.next) == second.symbol(b.next);
    }
    return true;
}

struct Boundary {
    int32_t first, second;
};

// The boundaries nearest to (i, j), by tokens skipped in all, from which the sides agree; the ends if there are none.
Boundary find_agreement(const Side& first, const Side& second, int32_t i, int32_t j) {
    for (int32_t cost = 1; cost <= kNear; ++cost) {
        for (int32_t x = i; x <= i + cost; ++x) {
            const int32_t y = j + cost - (x - i);
            if (x < first.size() && y < second.size() && agrees(first, second, x, y, evidence(cost))) return {x, y};
        }
    }
    const int32_t longest = std::max(first.size() - i, second.size() - j);
    Boundary best{first.size(), second.size()};
    int32_t best_cost = longest + std::min(first.size() - i, second.size() - j);
    std::vector<std::pair<uint64_t, int32_t>> boundaries;  // (key, boundary of the first side), sorted
    for (int32_t window = 4 * kNear;; window *= 2) {
        boundaries.clear();
        for (int32_t x = i; x < first.size() && x <= i + window; ++x) boundaries.emplace_back(first.key(x), x);
        std::sort(boundaries.begin(), boundaries.end());
        for (int32_t y = j; y < second.size() && y <= j + window && y - j < best_cost; ++y) {
            const uint64_t key = second.key(y);
            auto candidate = std::lower_bound(boundaries.begin(), boundaries.end(), std::make_pair(key, i));
            for (int tries = 0; tries < kTries && candidate != boundaries.end(); ++tries, ++candidate) {
                const int32_t x = candidate->second, cost = (x - i) + (y - j);
                if (candidate->first != key || cost >= best_cost) break;
                if (cost > kNear && agrees(first, second, x, y, kMostEvidence)) {
                    best = {x, y};
                    best_cost = cost;
                }
            }
        }
        if (best_cost <= window || window >= longest) return best;
    }
}

enum class Merge { closed, truncated, student_first, teacher_first };

struct Attempt {
    Merge outcome;
    int32_t student_end = 0, teacher_end = 0;  // of the chunk, if it closed
};

// Tries to close the finest chunk that begins at two cursors. Otherwise tells whether one side's text simply ends
// within the other's, or else which side comes first in an order of what they spell. The order makes the search that
// follows independent of which side is called the student.
Attempt close_chunk(Cursor a, Cursor b, SideOrder order) {
    for (;;) {
        const bool more_a = a.fill(), more_b = b.fill();
        if (more_a && more_b) {
            size_t taken = 0;
            if (!take_common(a, b, taken)) return {a.rest < b.rest ? Merge::student_first : Merge::teacher_first};
            if (a.rest.empty() && b.rest.empty()) return {Merge::closed, a.next, b.next};
            continue;
        }
        if ((!more_a && a.next == a.side.size()) || (!more_b && b.next == b.side.size())) return {Merge::truncated};
        if (more_a != more_b) return {more_b ? Merge::student_first : Merge::teacher_first};
        const bool student_first =
            order == SideOrder::by_symbol ? a.side.symbol(a.next) < b.side.symbol(b.next) : order == SideOrder::student;
        return {student_first ? Merge::student_first : Merge::teacher_first};
    }
}

// Where one side alone begins with a space (a dummy space): the first boundary that both share behind it. In text that
// repeats itself, the search for the nearest agreement would find one that is a character off.
Attempt pass_space(const Side& student, const Side& teacher, int32_t i, int32_t j, SideOrder order) {
    Cursor a{student, i, {}}, b{teacher, j, {}};
    const bool is_student = student.begins_with_space(i);
    if (is_student == teacher.begins_with_space(j)) return {Merge::student_first};
    Cursor& first = is_student ? a : b;
    first.skip_byte();
    const bool is_alone = first.rest.empty();
    const Attempt attempt = close_chunk(a, b, order);
    if (attempt.outcome != Merge::closed) return attempt;
    const int32_t x = attempt.student_end, y = attempt.teacher_end;
    const bool is_sure =
        x == student.size() || y == teacher.size() || agrees(student, teacher, x, y, evidence(x - i + y - j));
    if (!is_sure) return {Merge::student_first};
    return is_alone ? Attempt{Merge::closed, a.next, b.next} : attempt;
}

}  // namespace

void align_bytes(const TokenPair& pair, const int32_t* student_symbols, int32_t n, const int32_t* teacher_symbols,
                 int32_t m, SideOrder order, std::vector<Span>& chunks, std::vector<Span>& gaps) {
    const Side student(pair, student_symbols, n), teacher(pair, teacher_symbols, m);

    const auto add_gap = [&](Span gap) {
        const bool joins = !gaps.empty() && gaps.back().student_end == gap.student_start &&
                           gaps.back().teacher_end == gap.teacher_start;
        if (joins) {
            gaps.back().student_end = gap.student_end;
            gaps.back().teacher_end = gap.teacher_end;
        } else {
            gaps.push_back(gap);
        }
    };

    int32_t i = 0, j = 0;
    while (i < n && j < m) {
        if (student.symbol(i) == teacher.symbol(j)) {
            chunks.push_back({i, i + 1, j, j + 1});
            ++i, ++j;
            continue;
        }
        if (student.is_empty(i) || teacher.is_empty(j)) {
            student.is_empty(i) ? ++i : ++j;
            continue;
        }
        const Attempt attempt = close_chunk({student, i, {}}, {teacher, j, {}}, order);
        if (attempt.outcome == Merge::truncated) return;
        Span step{i, attempt.student_end, j, attempt.teacher_end};
        if (attempt.outcome == Merge::closed) {
            chunks.push_back(step);
        } else if (const Attempt behind = pass_space(student, teacher, i, j, order);
                   behind.outcome == Merge::truncated) {
            return;
        } else if (behind.outcome == Merge::closed) {
            step.student_end = behind.student_end, step.teacher_end = behind.teacher_end;
        } else {
            if (attempt.outcome == Merge::student_first) {
                const Boundary end = find_agreement(student, teacher, i, j);
                step.student_end = end.first, step.teacher_end = end.second;
            } else {
                const Boundary end = find_agreement(teacher, student, j, i);
                step.student_end = end.second, step.teacher_end = end.first;
            }
            add_gap(step);
        }
        i = step.student_end;
        j = step.teacher_end;
    }
    if (i < n || j < m) add_gap({i, n, j, m});
}

}  // namespace xtoken
