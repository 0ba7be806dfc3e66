// A loop over independent items on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace xtoken {

// Processors that this process may run on (the affinity mask where there is one).
int available_processors();

// Calls body(first, last) for consecutive ranges that cover [0, count). Ranges of at most `grain` items are handed out
// in order from a shared counter, so uneven items balance; `threads` <= 1 or a single range runs in the caller. The
// first exception stops the handing out and is rethrown in the caller.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace xtoken
