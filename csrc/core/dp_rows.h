// The two vector operations that fill a row of the table.
#pragma once

#include <cstdint>

namespace xtoken::dp {

// row[x] = max(base[x], from[x] + gain  where key[x] == wanted). `row` may be `base`.
void raise_row(int32_t* row, const int32_t* base, const int32_t* from, const int32_t* key, int32_t wanted, int32_t gain,
               int32_t count);

// row[x] = max(floor, row[0], ..., row[x]); returns the last one. Values are not negative.
int32_t running_max(int32_t* row, int32_t floor, int32_t count);

}  // namespace xtoken::dp
