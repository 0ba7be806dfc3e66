// The definition of the paper's alignment: the whole table, one cell at a time. The oracle of align_dp.
//
//     D(i,j) = max of  D(i-1,j-1) + (3 if s_i = t_j else -3)
//                      D(i-1,j) - 1.5
//                      D(i,j-1) - 1.5
//                      D(i-1,j-k) + 1.5 k   if s_i = t_{j-k+1} ... t_j      (k = 2 ... L)
//                      D(i-k,j-1) + 1.5 k   if t_j = s_{i-k+1} ... s_i      (k = 2 ... L)
//
// in this order; a later candidate wins only if it is strictly better. D(i,0) = -1.5 i, D(0,j) = -1.5 j.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dp_move.h"
#include "core/token_pair.h"

namespace xtoken {

// Appends the moves of the best alignment to `moves` and returns its score. Time and memory grow with n * m.
double align_table(const TokenPair& pair, const int32_t* student, int32_t n, const int32_t* teacher, int32_t m,
                   std::vector<dp::Move>& moves);

}  // namespace xtoken
