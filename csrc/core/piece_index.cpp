// The piece index: the common events of two vocabularies, and each vocabulary in the order of its pieces.
#include "core/piece_index.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string_view>
#include <tuple>

#include "core/boundary_walk.h"
#include "core/error.h"
#include "core/text_map.h"
#include "core/token_pair.h"

namespace xtoken {
namespace {

constexpr const char* kSideNames[2] = {"student", "teacher"};

std::vector<int32_t> partners_of(const std::vector<int32_t>& symbols, const std::vector<int32_t>& others,
                                 const Vocabulary& other) {
    std::vector<int32_t> best(1 + static_cast<size_t>(std::max(*std::max_element(symbols.begin(), symbols.end()),
                                                               *std::max_element(others.begin(), others.end()))),
                              -1);
    for (int32_t id = 0; id < other.size(); ++id) {
        int32_t& chosen = best[static_cast<size_t>(others[static_cast<size_t>(id)])];
        if (chosen < 0 || other.kind(id) < other.kind(chosen)) chosen = id;
    }
    std::vector<int32_t> result(symbols.size());
    for (size_t i = 0; i < symbols.size(); ++i) result[i] = best[static_cast<size_t>(symbols[i])];
    return result;
}

// Whether a text ends inside a character of UTF-8.
bool ends_inside(std::string_view text) {
    for (size_t n = 1; n <= std::min<size_t>(text.size(), 3); ++n) {
        const auto byte = static_cast<unsigned char>(text[text.size() - n]);
        if ((byte & 0xC0) != 0x80) return n < (byte < 0xC0 ? 1u : byte < 0xE0 ? 2u : byte < 0xF0 ? 3u : 4u);
    }
    return !text.empty() && (static_cast<unsigned char>(text[0]) & 0xC0) == 0x80;
}

// The pieces of every token of one side, as `PieceSide` describes them.
struct Pieces {
    std::vector<int32_t> ptr{0};
    std::vector<int32_t> ids;
};

Pieces usable_pieces(const Vocabulary& vocabulary, const Vocabulary& other, const std::vector<int32_t>& partner,
                     const std::vector<int32_t>& rows, const Sequences& given) {
    Pieces result;
    size_t next = 0;  // into rows
    for (int32_t id = 0; id < vocabulary.size(); ++id) {
        const bool is_given = next < rows.size() && rows[next] == id;
        if (partner[static_cast<size_t>(id)] >= 0) {
            result.ids.push_back(partner[static_cast<size_t>(id)]);
        } else if (is_given) {
            const std::string_view text = vocabulary.bytes(id);
            std::string_view rest = text;
            bool is_inside = false;
            for (int64_t p = given.ptr[next]; p < given.ptr[next + 1] && !rest.empty() && !is_inside; ++p) {
                const int32_t piece = given.ids[static_cast<size_t>(p)];
                const std::string_view bytes = other.bytes(piece);
                if (bytes.empty() || rest.substr(0, bytes.size()) != bytes) break;
                is_inside = ends_inside(text.substr(0, text.size() - rest.size() + bytes.size()));
                if (is_inside && rest.size() < text.size()) break;
                result.ids.push_back(piece);
                rest.remove_prefix(bytes.size());
            }
            if (!rest.empty()) result.ids.push_back(other.size());
        }
        next += is_given;
        if (result.ids.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
            value_error("vocabulary: over 2^31 pieces");
        }
        result.ptr.push_back(static_cast<int32_t>(result.ids.size()));
    }
    return result;
}

// The tokens with a partner that each token never precedes, see `PieceSide`.
Pieces joined_tokens(const Vocabulary& vocabulary, const std::vector<bool>& counts) {
    TextMap id_of(static_cast<size_t>(vocabulary.size()));  // of several the one that the tokenizer produces
    for (int32_t id = 0; id < vocabulary.size(); ++id) {
        if (!vocabulary.is_text(id) || vocabulary.bytes(id).empty()) continue;
        int32_t& chosen = id_of.at(vocabulary.bytes(id), id);
        if (vocabulary.kind(id) < vocabulary.kind(chosen)) chosen = id;
    }
    std::vector<std::pair<int32_t, int32_t>> found;
    for (const auto& [text, id] : id_of.entries()) {
        for (size_t length = 1; length < text.size(); ++length) {
            const int32_t* next = id_of.find(text.substr(length));
            if (!next || !counts[static_cast<size_t>(*next)]) continue;
            const int32_t* before = id_of.find(text.substr(0, length));
            if (before) found.emplace_back(*before, *next);
        }
    }
    std::sort(found.begin(), found.end());
    Pieces result;
    size_t n = 0;
    for (int32_t id = 0; id < vocabulary.size(); ++id) {
        for (; n < found.size() && found[n].first == id; ++n) result.ids.push_back(found[n].second);
        result.ptr.push_back(static_cast<int32_t>(n));
    }
    return result;
}

// Whether the pieces of token a come before those of token b.
bool is_before(const PieceSide& side, const PieceSide& other, int32_t a, int32_t b) {
    const auto at = [&](int32_t place) { return side.pieces + side.ptr[place]; };
    return std::lexicographical_compare(at(a), at(a + 1), at(b), at(b + 1), PieceOrder<PieceSide>{other});
}

// The order of both sides of an index, from its pieces and events.
void sort(std::vector<int32_t>& data) {
    const PieceIndex index = PieceIndex::view(data.data(), data.size(), false);
    for (size_t s = 0; s < 2; ++s) {
        const PieceSide& side = index.side[s];
        int32_t* order = data.data() + (side.order - data.data());
        std::iota(order, order + side.size, 0);
        std::stable_sort(order, order + side.size,
                         [&](int32_t a, int32_t b) { return is_before(side, index.side[1 - s], a, b); });
    }
}

Partners partners_of(const TokenPair& pair, const Vocabulary& student, const Vocabulary& teacher) {
    if (student.size() == 0 || teacher.size() == 0) value_error("vocabulary: expected at least one token");
    return {partners_of(pair.student_symbols(), pair.teacher_symbols(), teacher),
            partners_of(pair.teacher_symbols(), pair.student_symbols(), student)};
}

}  // namespace

Partners partners(const Vocabulary& student, const Vocabulary& teacher) {
    return partners_of(TokenPair(student, teacher, CanonicalRules{}), student, teacher);
}

std::vector<int32_t> build_piece_index(const Vocabulary& student, const Vocabulary& teacher,
                                       const std::vector<int32_t>& student_rows, const Sequences& student_pieces,
                                       const std::vector<int32_t>& teacher_rows, const Sequences& teacher_pieces) {
    const TokenPair pair(student, teacher, CanonicalRules{});
    const Partners exact = partners_of(pair, student, teacher);
    const std::array<const Vocabulary*, 2> vocabulary = {&student, &teacher};
    const std::array<const std::vector<int32_t>*, 2> partner = {&exact.student, &exact.teacher};
    const std::array<const std::vector<int32_t>*, 2> symbol = {&pair.student_symbols(), &pair.teacher_symbols()};
    const std::array<Pieces, 2> pieces = {usable_pieces(student, teacher, exact.student, student_rows, student_pieces),
                                          usable_pieces(teacher, student, exact.teacher, teacher_rows, teacher_pieces)};

    // Shorter texts first: a first piece is always shorter, so its root is known by then.
    std::array<std::vector<int32_t>, 2> event;
    std::vector<std::pair<size_t, int32_t>> tokens;
    for (size_t side = 0; side < 2; ++side) {
        event[side].assign(static_cast<size_t>(vocabulary[side]->size()), -1);
        for (int32_t id = 0; id < vocabulary[side]->size(); ++id) tokens.emplace_back(side, id);
    }
    std::stable_sort(tokens.begin(), tokens.end(), [&](const auto& a, const auto& b) {
        return vocabulary[a.first]->bytes(a.second).size() < vocabulary[b.first]->bytes(b.second).size();
    });
    std::vector<int32_t> event_of_symbol;
    int32_t events = 0;
    bool has_rootless = false;
    for (const bool is_exact : {true, false}) {
        for (const auto& [side, token] : tokens) {
            const size_t id = static_cast<size_t>(token);
            if ((partner[side]->at(id) >= 0) != is_exact) continue;
            if (is_exact) {
                const size_t s = static_cast<size_t>(symbol[side]->at(id));
                if (s >= event_of_symbol.size()) event_of_symbol.resize(s + 1, -1);
                if (event_of_symbol[s] < 0) event_of_symbol[s] = events++;
                event[side][id] = event_of_symbol[s];
            } else if (pieces[side].ptr[id] < pieces[side].ptr[id + 1]) {
                const int32_t first = pieces[side].ids[static_cast<size_t>(pieces[side].ptr[id])];
                if (first < vocabulary[1 - side]->size()) event[side][id] = event[1 - side][static_cast<size_t>(first)];
            }
            has_rootless |= event[side][id] < 0;
        }
    }

    std::vector<bool> is_part(static_cast<size_t>(events), false);  // of a character
    for (int32_t id = 0; id < student.size(); ++id) {
        if (exact.student[static_cast<size_t>(id)] >= 0 && student.is_text(id)) {
            is_part[static_cast<size_t>(event[0][static_cast<size_t>(id)])] = ends_inside(student.bytes(id));
        }
    }
    const auto joined_of = [&](size_t side) {
        std::vector<bool> counts;
        for (size_t id = 0; id < event[side].size(); ++id) {
            const int32_t e = event[side][id];
            counts.push_back(partner[side]->at(id) >= 0 || (e >= 0 && is_part[static_cast<size_t>(e)]));
        }
        return joined_tokens(*vocabulary[side], counts);
    };
    const std::array<Pieces, 2> joined = {joined_of(0), joined_of(1)};
    std::vector<int32_t> data = {student.size(), teacher.size(), events + has_rootless};
    for (const auto& lists : {pieces, joined}) {
        for (const Pieces& side : lists) data.push_back(static_cast<int32_t>(side.ids.size()));
    }
    const auto append = [&](const std::vector<int32_t>& part) { data.insert(data.end(), part.begin(), part.end()); };
    for (size_t side = 0; side < 2; ++side) {
        for (int32_t& e : event[side]) e = e < 0 ? events : e;
        append(event[side]);
        for (int32_t id = 0; id < vocabulary[side]->size(); ++id) {
            const bool is_text = vocabulary[side]->is_text(id);
            data.push_back(is_text ? static_cast<int32_t>(vocabulary[side]->bytes(id).size()) : 0);
        }
        data.resize(data.size() + event[side].size());  // the order
        for (const Pieces* lists : {&pieces[side], &joined[side]}) {
            append(lists->ptr);
            append(lists->ids);
        }
    }
    sort(data);
    return data;
}

std::vector<int32_t> merge_events(const int32_t* data, size_t size, const std::vector<int32_t>& event_of) {
    const PieceIndex index = PieceIndex::view(data, size, true);
    if (event_of.size() != static_cast<size_t>(index.events)) {
        value_error("event_of: expected ", index.events, " events, got ", event_of.size());
    }
    std::vector<int32_t> result(data, data + size);
    result[2] = 1 + *std::max_element(event_of.begin(), event_of.end());
    for (const PieceSide& side : index.side) {
        int32_t* events = result.data() + (side.event - data);
        for (int32_t id = 0; id < side.size; ++id) events[id] = event_of[static_cast<size_t>(side.event[id])];
    }
    sort(result);
    return result;
}

PieceIndex PieceIndex::view(const int32_t* data, size_t size, bool all) {
    const auto damaged = [](const auto&... parts) { value_error("pieces: not a piece index: ", parts...); };
    const auto check = [&](bool fits, size_t s) {
        if (!fits) damaged("a number of the ", kSideNames[s], "'s part is out of place");
    };
    if (size < kPieceIndexHead) damaged(size, " numbers");
    for (size_t i = 0; i < kPieceIndexHead; ++i) {
        if (data[i] < (i < 3)) damaged("number ", i, " of its head is ", data[i]);
    }
    const int64_t tokens = int64_t{data[0]} + data[1];
    if (data[2] > tokens) damaged(data[2], " events of ", tokens, " tokens");
    PieceIndex index{};
    index.events = data[2];
    const int32_t* next = data + kPieceIndexHead;
    size_t expected = kPieceIndexHead;
    for (size_t s = 0; s < 2; ++s) {
        expected +=
            5 * static_cast<size_t>(data[s]) + 2 + static_cast<size_t>(data[3 + s]) + static_cast<size_t>(data[5 + s]);
    }
    if (size != expected) damaged("expected ", expected, " numbers, got ", size);
    for (size_t s = 0; s < 2; ++s) {
        PieceSide& side = index.side[s];
        side.size = data[s];
        side.event = next;
        side.length = side.event + side.size;
        side.order = side.length + side.size;
        side.ptr = side.order + side.size;
        side.pieces = side.ptr + side.size + 1;
        side.joined_ptr = side.pieces + data[3 + s];
        side.joined = side.joined_ptr + side.size + 1;
        next = side.joined + data[5 + s];
    }
    for (size_t s = 0; all && s < 2; ++s) {
        const PieceSide& side = index.side[s];
        std::vector<bool> seen(static_cast<size_t>(side.size), false);
        int64_t text = 0;  // bytes, of which those of a chunk's tokens are summed
        bool fits = side.ptr[0] == 0 && side.ptr[side.size] == data[3 + s] && side.joined_ptr[0] == 0 &&
                    side.joined_ptr[side.size] == data[5 + s];
        for (int32_t i = 0; fits && i < side.size; ++i) {
            const int32_t id = side.order[i];
            fits = side.event[i] >= 0 && side.event[i] < index.events && side.length[i] >= 0 && id >= 0 &&
                   id < side.size && !seen[static_cast<size_t>(id)] && side.ptr[i] <= side.ptr[i + 1] &&
                   side.joined_ptr[i] <= side.joined_ptr[i + 1];
            if (fits) seen[static_cast<size_t>(id)] = true;
            text += side.length[i];
        }
        fits = fits && text <= std::numeric_limits<int32_t>::max();
        for (int32_t p = 0; fits && p < data[3 + s]; ++p) {
            fits = side.pieces[p] >= 0 && side.pieces[p] <= data[1 - s];
        }
        for (int32_t p = 0; fits && p < data[5 + s]; ++p) fits = side.joined[p] >= 0 && side.joined[p] < side.size;
        check(fits, s);
    }
    for (size_t s = 0; all && s < 2; ++s) {  // events and pieces of both sides are valid
        const PieceSide& side = index.side[s];
        bool fits = true;
        for (int32_t i = 1; fits && i < side.size; ++i) {
            fits = !is_before(side, index.side[1 - s], side.order[i], side.order[i - 1]);
        }
        check(fits, s);
    }
    return index;
}

std::vector<InnerBoundary> inner_boundaries(const PieceIndex& index, size_t chunks, const PredictedTokens& student,
                                            const PredictedTokens& teacher) {
    std::vector<InnerBoundary> result;
    const std::array<const PredictedTokens*, 2> predicted = {&student, &teacher};
    for (size_t k = 0; k < chunks; ++k) {
        std::array<int64_t, 2> length = {0, 0};
        for (size_t s = 0; s < 2; ++s) {
            const PredictedTokens& side = *predicted[s];
            for (int64_t row = side.start[k]; row < side.start[k] + side.count[k]; ++row) {
                const int64_t id = row >= 0 && row < side.rows ? side.next[row] : -1;
                if (id < 0 || id >= index.side[s].size) {
                    value_error("alignment: expected ", kSideNames[s], "_ids in 0 ... ", index.side[s].size - 1,
                                " within chunks, got ", id);
                }
                length[s] += index.side[s].length[id];
            }
        }
        if (length[0] != length[1] || (student.count[k] == 1 && teacher.count[k] == 1)) continue;
        for (size_t s = 0; s < 2; ++s) {
            const PieceSide& whole = index.side[s];
            const PredictedTokens &ours = *predicted[s], &theirs = *predicted[1 - s];
            const int64_t* known = theirs.next + theirs.start[k];
            const int64_t* tokens = ours.next + ours.start[k];
            BoundaryWalk<int64_t> walk{};
            walk.start();
            const auto advance = [&] {
                walk.advance(whole, tokens, ours.count[k], index.side[1 - s], known, theirs.count[k]);
            };
            for (advance(); walk.whole < ours.count[k]; advance()) {
                const int64_t* inside = known + walk.part - walk.depth;
                const auto compare = [&](int32_t token) {
                    return compare_beginning(whole, index.side[1 - s], token, inside, walk.depth);
                };
                const int32_t *begin = whole.order, *end = whole.order + whole.size;
                const int32_t* first = std::partition_point(begin, end, [&](int32_t t) { return compare(t) < 0; });
                const int32_t* last = std::partition_point(first, end, [&](int32_t t) { return compare(t) == 0; });
                result.push_back({static_cast<int64_t>(k), static_cast<int64_t>(s), ours.start[k] + walk.whole,
                                  theirs.start[k] + walk.part, walk.depth, first - begin, last - begin});
            }
        }
    }
    return result;
}

}  // namespace xtoken
