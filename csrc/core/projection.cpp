// The projection matrix W from student to teacher vocabulary: exact images, weights of pieces, cuts.
#include "core/projection.h"

#include <algorithm>
#include <tuple>

#include "core/error.h"

namespace xtoken {
namespace {

struct Entry {
    int32_t col;
    double weight;
};

// Among tokens of equal text: the one that the tokenizer produces (normal before byte), then the lowest id.
bool preferred(const Vocabulary& vocabulary, int32_t a, int32_t b) {
    return std::make_tuple(vocabulary.kind(a), a) < std::make_tuple(vocabulary.kind(b), b);
}

void offer(TextMap& ids, std::string_view text, int32_t id, const Vocabulary& vocabulary) {
    int32_t& chosen = ids.at(text, id);
    if (preferred(vocabulary, id, chosen)) chosen = id;
}

// Keeps the top_k largest entries, the earlier on ties, divides by their sum and appends the row in column order.
void append_row(std::vector<Entry>& entries, int32_t top_k, SparseRows& rows) {
    std::stable_sort(entries.begin(), entries.end(), [](Entry a, Entry b) { return a.weight > b.weight; });
    if (entries.size() > static_cast<size_t>(top_k)) entries.resize(static_cast<size_t>(top_k));
    double sum = 0;
    for (const Entry& entry : entries) sum += entry.weight;
    std::sort(entries.begin(), entries.end(), [](Entry a, Entry b) { return a.col < b.col; });
    for (const Entry& entry : entries) {
        rows.col.push_back(entry.col);
        rows.weight.push_back(static_cast<float>(entry.weight / sum));
    }
}

void close_row(SparseRows& rows) { rows.row_ptr.push_back(static_cast<int64_t>(rows.col.size())); }

}  // namespace

ExactImages exact_images(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules) {
    const size_t most = static_cast<size_t>(teacher.size());
    TextMap by_bytes(most), by_text(rules.fold_space_punctuation ? most : 0), by_literal(most);
    for (int32_t id = 0; id < teacher.size(); ++id) {
        const std::string_view bytes = teacher.bytes(id);
        if (teacher.kind(id) == TokenKind::special) by_literal.at(bytes, id);
        if (!teacher.is_text(id) || bytes.empty()) continue;
        offer(by_bytes, bytes, id, teacher);
        if (rules.fold_space_punctuation) offer(by_text, canonical_text(bytes, rules), id, teacher);
    }

    ExactImages result;
    result.image.assign(static_cast<size_t>(student.size()), -1);
    result.kind.assign(static_cast<size_t>(student.size()), RowKind::none);
    const auto set = [&](int32_t id, int32_t image, RowKind kind) {
        result.image[static_cast<size_t>(id)] = image;
        result.kind[static_cast<size_t>(id)] = kind;
    };
    for (const auto& [role, id] : student.roles()) {
        if (result.image[static_cast<size_t>(id)] >= 0) continue;  // the first role of a token that matches counts
        for (const auto& [other, teacher_id] : teacher.roles()) {
            if (role == other) set(id, teacher_id, RowKind::role);
        }
    }
    for (int32_t id = 0; id < student.size(); ++id) {
        const std::string_view bytes = student.bytes(id);
        if (student.kind(id) == TokenKind::special && result.image[static_cast<size_t>(id)] < 0) {
            if (const int32_t* found = by_literal.find(bytes)) set(id, *found, RowKind::role);
        }
        if (!student.is_text(id) || bytes.empty()) continue;
        if (id < teacher.size() && teacher.kind(id) == TokenKind::normal && teacher.bytes(id) == bytes) {
            set(id, id, RowKind::exact);
            continue;
        }
        const int32_t* found = by_bytes.find(bytes);
        if (!found && rules.fold_space_punctuation) found = by_text.find(canonical_text(bytes, rules));
        if (found) set(id, *found, RowKind::exact);
    }
    // Of several tokens with one image that which the tokenizer produces is the exact one, equal bytes first.
    const auto rank = [&](int32_t id, int32_t image) {
        return std::make_tuple(student.bytes(id) != teacher.bytes(image), student.kind(id), id);
    };
    std::vector<int32_t> owners(static_cast<size_t>(teacher.size()), -1);
    for (int32_t id = 0; id < student.size(); ++id) {
        if (result.kind[static_cast<size_t>(id)] != RowKind::exact) continue;
        const int32_t image = result.image[static_cast<size_t>(id)];
        int32_t& owner = owners[static_cast<size_t>(image)];
        const bool is_better = owner < 0 || rank(id, image) < rank(owner, image);
        const int32_t other = is_better ? owner : id;
        if (other >= 0) result.kind[static_cast<size_t>(other)] = RowKind::pieces;
        if (is_better) owner = id;
    }
    return result;
}

LongestMatch::LongestMatch(const Vocabulary& vocabulary) : ids_(static_cast<size_t>(vocabulary.size())) {
    for (int32_t id = 0; id < vocabulary.size(); ++id) {
        const std::string_view bytes = vocabulary.bytes(id);
        if (!vocabulary.is_text(id) || bytes.empty()) continue;
        offer(ids_, bytes, id, vocabulary);
        longest_ = std::max(longest_, bytes.size());
    }
}

void LongestMatch::encode(std::string_view text, std::vector<int32_t>& ids) const {
    while (!text.empty()) {
        size_t length = std::min(longest_, text.size());
        for (; length > 0; --length) {
            const int32_t* found = ids_.find(text.substr(0, length));
            if (!found) continue;
            ids.push_back(*found);
            break;
        }
        text.remove_prefix(std::max<size_t>(1, length));
    }
}

SparseRows build_rows(const std::vector<int32_t>& image, const std::vector<int32_t>& rows, const Sequences& pieces,
                      PieceWeights weights) {
    SparseRows matrix;
    matrix.row_ptr.reserve(image.size() + 1);
    matrix.row_ptr.push_back(0);
    std::vector<Entry> entries;
    size_t next = 0;  // into rows
    for (size_t s = 0; s < image.size(); ++s) {
        entries.clear();
        if (image[s] >= 0) entries.push_back({image[s], 1.0});
        if (next < rows.size() && static_cast<size_t>(rows[next]) == s) {
            double weight = weights.beta;
            for (int64_t p = pieces.ptr[next]; p < pieces.ptr[next + 1]; ++p, weight *= weights.gamma) {
                const int32_t id = pieces.ids[static_cast<size_t>(p)];
                const auto same = std::find_if(entries.begin(), entries.end(), [&](Entry e) { return e.col == id; });
                if (same != entries.end()) {
                    same->weight += weight;
                } else if (weight > 0) {
                    entries.push_back({id, weight});
                }
            }
            ++next;
        }
        append_row(entries, weights.top_k, matrix);
        close_row(matrix);
    }
    return matrix;
}

SparseRows add_reverse(const SparseRows& matrix, const std::vector<int32_t>& columns, const Sequences& pieces,
                       PieceWeights weights) {
    const size_t rows = matrix.row_ptr.size() - 1;
    std::vector<std::vector<Entry>> added(rows);
    for (size_t k = 0; k < columns.size(); ++k) {
        double weight = weights.beta;
        for (int64_t p = pieces.ptr[k]; p < pieces.ptr[k + 1]; ++p, weight *= weights.gamma) {
            std::vector<Entry>& row = added[static_cast<size_t>(pieces.ids[static_cast<size_t>(p)])];
            if (!row.empty() && row.back().col == columns[k]) {
                row.back().weight += weight;  // a repeated piece of the same token
            } else if (weight > 0) {
                row.push_back({columns[k], weight});
            }
        }
    }
    SparseRows result;
    result.row_ptr.reserve(rows + 1);
    result.row_ptr.push_back(0);
    std::vector<Entry> entries;
    for (size_t s = 0; s < rows; ++s) {
        const size_t first = static_cast<size_t>(matrix.row_ptr[s]), last = static_cast<size_t>(matrix.row_ptr[s + 1]);
        if (added[s].empty()) {
            result.col.insert(result.col.end(), matrix.col.begin() + first, matrix.col.begin() + last);
            result.weight.insert(result.weight.end(), matrix.weight.begin() + first, matrix.weight.begin() + last);
        } else {
            entries.clear();
            for (size_t k = first; k < last; ++k) entries.push_back({matrix.col[k], matrix.weight[k]});
            entries.insert(entries.end(), added[s].begin(), added[s].end());
            std::stable_sort(entries.begin(), entries.end(), [](Entry a, Entry b) { return a.col < b.col; });
            append_row(entries, weights.top_k, result);
        }
        close_row(result);
    }
    return result;
}

}  // namespace xtoken
