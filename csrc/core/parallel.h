// A loop over independent items on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace xtoken {

// Processors that this process may run on (the affinity mask where there is one).
int available_processors();

// Calls body(worker, item) for every item of [0, count) on at most `threads` workers, the caller being one of them.
// Items are handed out in order from a shared counter, which balances uneven ones; `worker`, in [0, threads), says who
// works on it. After the first exception no more items are handed out, and it is rethrown in the caller. Threads that
// the system refuses are done without, and an item for which there is no memory is begun again when the other threads
// have ended.
void parallel_for(int64_t count, int threads, const std::function<void(int, int64_t)>& body);

}  // namespace xtoken
