// A loop over independent items on several threads.
#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace xtoken {

int available_processors() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

namespace {

// Bytes for threads to begin with, where memory is what the system refuses the next one for. Never written.
constexpr size_t reserved = size_t{1} << 24;

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int, int64_t)>& body) {
    const auto wanted = static_cast<size_t>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, count)));
    std::vector<std::thread> others;
    others.reserve(wanted);
    std::vector<int64_t> left;  // items for which there was no memory beside that of other threads
    left.reserve(wanted);
    std::mutex mutex;
    std::condition_variable changed;
    size_t arrived = 0;
    bool begun = false;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    const auto work = [&](int worker) {
        if (worker > 0) {
            std::unique_lock<std::mutex> lock(mutex);
            std::current_exception();  // makes what a thread needs to throw; if that fails, the process ends
            ++arrived;
            changed.notify_all();
            changed.wait(lock, [&] { return begun; });
        }
        int64_t item = 0;
        try {
            while ((item = next.fetch_add(1)) < count) body(worker, item);
        } catch (const std::bad_alloc&) {
            std::lock_guard<std::mutex> lock(mutex);
            left.push_back(item);
        } catch (...) {
            next = count;
            std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    };
    {
        auto reserve = std::unique_ptr<char[]>(new char[reserved]);
        std::unique_lock<std::mutex> lock(mutex);  // nobody needs memory before it is known how many do
        try {
            while (others.size() + 1 < wanted) others.emplace_back(work, static_cast<int>(others.size()) + 1);
        } catch (const std::exception&) {  // no more threads to be had: the work is done by fewer
            reserve.reset();
            changed.wait(lock, [&] { return arrived == others.size(); });
        }
        begun = true;
        changed.notify_all();
    }
    work(0);
    for (std::thread& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
    for (const int64_t item : left) body(0, item);
    for (int64_t item; (item = next.fetch_add(1)) < count;) body(0, item);
}

}  // namespace xtoken
