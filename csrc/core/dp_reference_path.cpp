// The reference path: a cheap alignment that is nearly always optimal, up to small detours.
#include "core/dp_reference_path.h"

#include <algorithm>
#include <string_view>
#include <utility>

namespace xtoken::dp {
namespace {

constexpr int kMaxDepth = 24;  // of splitting at anchors; a hostile input must not cost a pass for each anchor

// Gaps for `students` and `teachers` tokens, alternating, so that the path stays near the diagonal.
void append_gaps(int32_t students, int32_t teachers, std::vector<Move>& moves) {
    int64_t s = 0, t = 0;
    while (s < students || t < teachers) {
        const bool student_is_behind = s * teachers <= t * students;
        if (s < students && (student_is_behind || t == teachers)) {
            moves.push_back(kStudentGap);
            ++s;
        } else {
            moves.push_back(kTeacherGap);
            ++t;
        }
    }
}

// A step over `students` and `teachers` tokens that spell the same text.
void append_step(int32_t students, int32_t teachers, std::vector<Move>& moves) {
    if (std::min(students, teachers) == 1 && std::max(students, teachers) <= kMaxRun) {
        moves.push_back({static_cast<uint8_t>(students), static_cast<uint8_t>(teachers), true});
    } else {
        append_gaps(students, teachers, moves);
    }
}

}  // namespace

void ReferencePathBuilder::build(const Document& document, ReferencePath& path) {
    document_ = &document;
    moves_.clear();
    tail_.clear();
    counts_.assign(document.num_letters(), {});
    align({0, document.student().size(), 0, document.teacher().size()}, 0);

    std::swap(path.moves, moves_);
    path.student_at.resize(path.moves.size() + 1);
    path.teacher_at.resize(path.moves.size() + 1);
    int32_t i = 0, j = 0;
    for (int32_t e = 0; e < path.size(); ++e) {
        path.student_at[e] = i;
        path.teacher_at[e] = j;
        i += path.moves[e].student;
        j += path.moves[e].teacher;
    }
    path.student_at.back() = i;
    path.teacher_at.back() = j;
}

void ReferencePathBuilder::align(Rect rect, int depth) {
    merge<false>(rect, moves_);
    const size_t tail_start = tail_.size();
    merge<true>(rect, tail_);

    std::vector<std::pair<int32_t, int32_t>> anchors;
    if (rect.rows() > 0 && rect.cols() > 0 && depth < kMaxDepth) find_anchors(rect, anchors);
    for (const auto& [i, j] : anchors) {
        align({rect.student_start, i, rect.teacher_start, j}, depth + 1);
        moves_.push_back(kMatch);
        rect.student_start = i + 1;
        rect.teacher_start = j + 1;
    }
    if (anchors.empty()) {
        append_gaps(rect.rows(), rect.cols(), moves_);
    } else {
        align(rect, depth + 1);
    }
    moves_.insert(moves_.end(), tail_.rbegin(), tail_.rend() - static_cast<std::ptrdiff_t>(tail_start));
    tail_.resize(tail_start);
}

// Consumes `rect` from one end for as long as the bytes agree.
template <bool kBackward>
void ReferencePathBuilder::merge(Rect& rect, std::vector<Move>& moves) const {
    const Document& document = *document_;
    const int32_t *s = document.student().letters.data(), *t = document.teacher().letters.data();
    const auto student = [&](int32_t x) { return kBackward ? s[rect.student_end - 1 - x] : s[rect.student_start + x]; };
    const auto teacher = [&](int32_t x) { return kBackward ? t[rect.teacher_end - 1 - x] : t[rect.teacher_start + x]; };
    const auto take = [](std::string_view& text, size_t length) {
        const size_t at = kBackward ? text.size() - length : 0;
        const std::string_view taken = text.substr(at, length);
        kBackward ? text.remove_suffix(length) : text.remove_prefix(length);
        return taken;
    };

    const int32_t rows = rect.rows(), cols = rect.cols();
    int32_t i = 0, j = 0;  // consumed: up to here both sides spell the same bytes
    while (i < rows && j < cols) {
        if (student(i) == teacher(j)) {
            moves.push_back(kMatch);
            ++i, ++j;
            continue;
        }
        if (document.is_atomic(student(i)) || document.is_atomic(teacher(j))) break;
        std::string_view s_rest = document.text(student(i)), t_rest = document.text(teacher(j));
        if (s_rest.empty()) {
            moves.push_back(kStudentGap);
            ++i;
            continue;
        }
        if (t_rest.empty()) {
            moves.push_back(kTeacherGap);
            ++j;
            continue;
        }
        int32_t s_count = 1, t_count = 1;
        bool agree = true;
        while (agree) {
            const size_t shared = std::min(s_rest.size(), t_rest.size());
            agree = take(s_rest, shared) == take(t_rest, shared);
            if (!agree || (s_rest.empty() && t_rest.empty())) break;
            if (s_rest.empty()) {
                agree = i + s_count < rows && !document.is_atomic(student(i + s_count));
                if (agree) s_rest = document.text(student(i + s_count++));
            } else {
                agree = j + t_count < cols && !document.is_atomic(teacher(j + t_count));
                if (agree) t_rest = document.text(teacher(j + t_count++));
            }
        }
        if (!agree) break;
        append_step(s_count, t_count, moves);
        i += s_count;
        j += t_count;
    }
    if (kBackward) {
        rect.student_end -= i;
        rect.teacher_end -= j;
    } else {
        rect.student_start += i;
        rect.teacher_start += j;
    }
}

// Pairs of equal tokens that occur once on each side: the longest chain that increases on both.
void ReferencePathBuilder::find_anchors(const Rect& rect, std::vector<std::pair<int32_t, int32_t>>& anchors) {
    const int32_t *s = document_->student().letters.data(), *t = document_->teacher().letters.data();
    for (int32_t i = rect.student_start; i < rect.student_end; ++i) ++counts_[s[i]].student;
    for (int32_t j = rect.teacher_start; j < rect.teacher_end; ++j) {
        ++counts_[t[j]].teacher;
        counts_[t[j]].teacher_at = j;
    }

    struct Link {
        int32_t i, j, before;
    };
    std::vector<Link> links;
    std::vector<int32_t> ends;  // ends[x]: the link with the smallest j that ends a chain of x + 1
    for (int32_t i = rect.student_start; i < rect.student_end; ++i) {
        const Count& count = counts_[s[i]];
        if (count.student != 1 || count.teacher != 1) continue;
        const auto place = std::lower_bound(ends.begin(), ends.end(), count.teacher_at,
                                            [&](int32_t link, int32_t j) { return links[link].j < j; });
        links.push_back({i, count.teacher_at, place == ends.begin() ? -1 : *(place - 1)});
        const int32_t link = static_cast<int32_t>(links.size()) - 1;
        if (place == ends.end()) {
            ends.push_back(link);
        } else {
            *place = link;
        }
    }
    for (int32_t link = ends.empty() ? -1 : ends.back(); link >= 0; link = links[link].before) {
        anchors.emplace_back(links[link].i, links[link].j);
    }
    std::reverse(anchors.begin(), anchors.end());

    for (int32_t i = rect.student_start; i < rect.student_end; ++i) counts_[s[i]] = {};
    for (int32_t j = rect.teacher_start; j < rect.teacher_end; ++j) counts_[t[j]] = {};
}

}  // namespace xtoken::dp
