// The projection matrix W from student to teacher vocabulary: exact images, weights of pieces, cuts.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/text_map.h"
#include "core/token_pair.h"
#include "core/vocabulary.h"

namespace xtoken {

// How a row of W came about.
enum class RowKind : uint8_t {
    none = 0,    // empty
    exact = 1,   // one teacher token with the same bytes, which is so of no other row
    role = 2,    // a special token of the same role or literal
    pieces = 3,  // the token's text, re-tokenized by the teacher
    given = 4,   // from outside, not by these rules
};

// Pass 1: for every student token the teacher token of equal text or role, or -1.
struct ExactImages {
    std::vector<int32_t> image;  // [student size]
    std::vector<RowKind> kind;   // [student size]: none, exact, role, or pieces for a second token of a text
};
ExactImages exact_images(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules);

// Token sequences, one after the other: sequence k is ids[ptr[k]] ... ids[ptr[k + 1] - 1].
struct Sequences {
    std::vector<int64_t> ptr;  // [count + 1]
    std::vector<int32_t> ids;
};

// Cuts texts into tokens of a vocabulary without a tokenizer, greedily by the longest token that fits next; a byte that
// no token begins with is left out. Of tokens with equal bytes, normal ones come before byte tokens, then lower ids.
class LongestMatch {
  public:
    explicit LongestMatch(const Vocabulary& vocabulary);  // which must outlive this object
    void encode(std::string_view text, std::vector<int32_t>& ids) const;

  private:
    TextMap ids_;
    size_t longest_ = 0;
};

// Rows of a sparse matrix, columns strictly increasing within a row.
struct SparseRows {
    std::vector<int64_t> row_ptr;  // [rows + 1]
    std::vector<int32_t> col;
    std::vector<float> weight;
};

// How weight is spread: piece i of a token gets beta * gamma^i, the weights of a repeated piece add up, the top_k
// largest are kept (earlier position first on ties) and divided by their sum.
struct PieceWeights {
    double beta = 0.9, gamma = 0.1;
    int32_t top_k = 4;
};

// Pass 2: rows of weight 1 at `image`, and for the tokens `rows` (increasing) the weights of their `pieces`.
SparseRows build_rows(const std::vector<int32_t>& image, const std::vector<int32_t>& rows, const Sequences& pieces,
                      PieceWeights weights);

// Pass 3: for teacher tokens `columns`, each encoded by the student into `pieces`, adds beta * gamma^i to (piece i,
// column); then cuts every row that changed to top_k (larger weight, then lower column) and normalises it.
SparseRows add_reverse(const SparseRows& matrix, const std::vector<int32_t>& columns, const Sequences& pieces,
                       PieceWeights weights);

}  // namespace xtoken
