// A loop over independent items on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace xtoken {

// Processors that this process may run on (the affinity mask where there is one).
int available_processors();

// Calls body(worker, item) for every item of [0, count) on at most `threads` workers, the caller being one of them.
// Items are handed out in order from a shared counter, so uneven ones balance; `worker` tells in [0, threads) who works
// on it. The first exception stops the handing out and is rethrown in the caller.
void parallel_for(int64_t count, int threads, const std::function<void(int, int64_t)>& body);

}  // namespace xtoken
