// Threads and scratch memory that live from call to call.
#include "cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/huge_pages.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define XTOKEN_HAS_FORK 1
#else
#define XTOKEN_HAS_FORK 0
#endif

namespace xtoken::cpu {
namespace {

// One call of run_items: what its threads share.
class Job {
  public:
    Job(int64_t count, const std::function<void(int64_t, Scratch&)>& body) : count_(count), body_(body) {}

    void work(Scratch& scratch) {
        try {
            for (int64_t item; (item = next_.fetch_add(1)) < count_;) {
                scratch.clear();
                body_(item, scratch);
            }
        } catch (...) {
            next_ = count_;
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void expect(int workers) { running_ = workers; }
    void finish_one() {
        std::lock_guard<std::mutex> lock(mutex_);
        if (--running_ == 0) done_.notify_one();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return running_ == 0; });
        if (error_) std::rethrow_exception(error_);
    }

  private:
    const int64_t count_;
    const std::function<void(int64_t, Scratch&)>& body_;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
    std::condition_variable done_;
    int running_ = 0;
    std::exception_ptr error_;
};

// A thread that waits for jobs. Its loop never returns: threads end with the process.
struct Worker {
    std::mutex mutex;
    std::condition_variable wake;
    Job* job = nullptr;

    void start(Job* assigned) {
        std::lock_guard<std::mutex> lock(mutex);
        job = assigned;
        wake.notify_one();
    }
};

struct Pool {
    std::mutex mutex;
    std::vector<Worker*> idle_workers;  // with room for all, since threads that come back must not fail
    size_t started = 0;
    std::vector<std::unique_ptr<Scratch>> idle_scratch;  // of callers

    void loop(Worker* self) {
        std::current_exception();  // makes what a thread needs to throw; if that fails, the process ends
        Scratch scratch;
        for (;;) {
            Job* job = nullptr;
            {
                std::unique_lock<std::mutex> lock(self->mutex);
                self->wake.wait(lock, [&] { return self->job != nullptr; });
                std::swap(job, self->job);
            }
            job->work(scratch);
            {
                std::lock_guard<std::mutex> lock(mutex);
                idle_workers.push_back(self);
            }
            job->finish_one();
        }
    }

    std::vector<Worker*> take_workers(int wanted) {
        std::lock_guard<std::mutex> lock(mutex);
        std::vector<Worker*> taken;
        taken.reserve(static_cast<size_t>(std::max(wanted, 0)));
        while (static_cast<int>(taken.size()) < wanted) {
            if (idle_workers.empty()) {
                try {
                    auto worker = std::make_unique<Worker>();
                    idle_workers.reserve(started + 1);
                    std::thread([this, self = worker.get()] { loop(self); }).detach();
                    taken.push_back(worker.release());
                    ++started;
                } catch (const std::exception&) {
                    break;  // no more threads to be had: the work is done by fewer
                }
            } else {
                taken.push_back(idle_workers.back());
                idle_workers.pop_back();
            }
        }
        return taken;
    }

    std::unique_ptr<Scratch> take_scratch() {
        std::lock_guard<std::mutex> lock(mutex);
        if (idle_scratch.empty()) return std::make_unique<Scratch>();
        std::unique_ptr<Scratch> scratch = std::move(idle_scratch.back());
        idle_scratch.pop_back();
        return scratch;
    }

    void give_back(std::unique_ptr<Scratch> scratch) {
        std::lock_guard<std::mutex> lock(mutex);
        idle_scratch.push_back(std::move(scratch));
    }
};

// Never destroyed: its threads may outlive static destructors. Replaced in the child of a fork, where those threads do
// not exist and the lock may be held by one of them.
Pool* pool = nullptr;

Pool& the_pool() {
    static const bool made = [] {
        pool = new Pool;
#if XTOKEN_HAS_FORK
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
        return true;
    }();
    (void)made;
    return *pool;
}

}  // namespace

void* Scratch::take_bytes(size_t bytes) {
    if (used_ == std::size(blocks_)) throw std::logic_error("scratch: more blocks than expected");
    Block& block = blocks_[used_++];
    if (block.size < bytes) {
        block = Block{};
        const size_t unit = bytes < huge_page / 2 ? alignment : huge_page;
        const size_t size = (bytes + unit - 1) / unit * unit;
        block.memory.reset(new char[size + unit]);
        const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
        block.begin = block.memory.get() + (unit - address % unit) % unit;
        block.size = size;
        prefer_huge_pages(block.begin, size);
    }
    return block.begin;
}

void Scratch::clear() { used_ = 0; }

void run_items(int64_t count, int threads, const std::function<void(int64_t, Scratch&)>& body) {
    if (count <= 0) return;
    Pool& shared = the_pool();
    Job job(count, body);
    const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
    std::unique_ptr<Scratch> scratch = shared.take_scratch();
    const std::vector<Worker*> workers = shared.take_workers(helpers);
    job.expect(static_cast<int>(workers.size()));
    for (Worker* worker : workers) worker->start(&job);
    job.work(*scratch);
    shared.give_back(std::move(scratch));
    job.wait();
}

}  // namespace xtoken::cpu
