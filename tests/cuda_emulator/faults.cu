// Kernels for the emulator's own tests: some are correct, and each of the others has one fault.
#include "cuda/chunks.cuh"

#include <cstring>
#include <exception>
#include <string_view>

namespace {

constexpr unsigned all = 0xffffffffu;

struct Arguments {
    const float* in;  // [n]
    float* out;       // [n]
    unsigned* count;  // [2]
    int n;
};

// ---- correct ----

// Sum of the input into out[block], through shuffles and static shared memory.
__global__ void block_sum(Arguments a) {
    XTOKEN_SHARED(partial, float[32]);
    float sum = 0;
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) sum += a.in[i];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(all, sum, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0;
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
        a.out[blockIdx.x] = sum;
    }
}

// Reverses the input through dynamic shared memory of n floats; one block.
__global__ void reverse(Arguments a) {
    XTOKEN_DYNAMIC_SHARED(float, values);
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) values[i] = a.in[i];
    __syncthreads();
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) a.out[i] = values[a.n - 1 - i];
}

// The same with 16-byte loads; n is a multiple of 4.
__global__ void reverse_by_four(Arguments a) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n / 4; i += gridDim.x * blockDim.x) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(a.in) + i);
        __stcs(reinterpret_cast<float4*>(a.out) + a.n / 4 - 1 - i, make_float4(v.w, v.z, v.y, v.x));
    }
}

// Every thread of every block counts the positive inputs at its places; the last block to finish stores the total.
__global__ void count_positive(Arguments a) {
    XTOKEN_SHARED(in_block, unsigned);
    XTOKEN_SHARED(is_last, bool);
    if (threadIdx.x == 0) in_block = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += gridDim.x * blockDim.x) {
        if (a.in[i] > 0) atomicAdd(&in_block, 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        a.out[1 + blockIdx.x] = in_block;
        __threadfence();
        is_last = atomicAdd(a.count, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (is_last && threadIdx.x == 0) {
        float total = 0;
        for (unsigned block = 0; block < gridDim.x; ++block) total += a.out[1 + block];
        a.out[0] = total;
    }
}

// Each warp moves its values one lane to the right, through shared memory and a warp barrier only.
__global__ void rotate_warp(Arguments a) {
    XTOKEN_SHARED(lanes, float[1024]);
    lanes[threadIdx.x] = a.in[threadIdx.x];
    __syncwarp();
    a.out[threadIdx.x] = lanes[threadIdx.x / 32 * 32 + (threadIdx.x + 31) % 32];
}

// Warp specialisation: the first warp works alone, with warp barriers only; the others wait at the block's barrier.
__global__ void first_warp_scans(Arguments a) {
    XTOKEN_SHARED(sums, float[32]);
    if (threadIdx.x < 32) {
        float sum = a.in[threadIdx.x];
        for (unsigned delta = 1; delta < 32; delta *= 2) {
            const float other = __shfl_up_sync(all, sum, delta);
            if (threadIdx.x >= delta) sum += other;
        }
        sums[threadIdx.x] = sum;
        __syncwarp();
    }
    __syncthreads();
    a.out[threadIdx.x] = sums[threadIdx.x % 32];
}

// Votes and counts of the block: out = {any, all, count, ballot of the warp, lowest set lane}, by thread 0.
__global__ void votes(Arguments a) {
    const bool positive = a.in[threadIdx.x] > 0;
    const int any = __syncthreads_or(positive), every = __syncthreads_and(positive),
              count = __syncthreads_count(positive);
    const unsigned ballot = __ballot_sync(all, positive);
    const unsigned same = __match_any_sync(all, positive);
    const bool consistent = same == (positive ? ballot : ~ballot) && __any_sync(all, positive) == (ballot != 0) &&
                            __all_sync(all, positive) == (ballot == all) &&
                            __reduce_add_sync(all, static_cast<unsigned>(positive)) == unsigned(__popc(ballot));
    if (threadIdx.x == 0) {
        a.out[0] = any;
        a.out[1] = every;
        a.out[2] = count;
        a.out[3] = __popc(ballot);
        a.out[4] = __ffs(ballot);
        a.out[5] = consistent;
    }
}

// The same through asynchronous copies, two of them in flight.
__global__ void reverse_by_copies(Arguments a) {
    XTOKEN_DYNAMIC_SHARED(float4, slots);
    const int step = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
    const auto copy = [&](int i) {
        if (i < a.n / 4) xtoken::cuda::copy_async<16>(slots + i / step % 2 * blockDim.x + threadIdx.x, a.in + 4 * i);
        xtoken::cuda::commit_copies();
    };
    copy(first);
    copy(first + step);
    for (int i = first; i < a.n / 4; i += step) {
        xtoken::cuda::wait_copies<1>();
        const float4 v = slots[i / step % 2 * blockDim.x + threadIdx.x];
        copy(i + 2 * step);
        reinterpret_cast<float4*>(a.out)[a.n / 4 - 1 - i] = make_float4(v.w, v.z, v.y, v.x);
    }
}

// What each_chunk takes, of n / 4 chunks; `in` are zeros, and the queue is `count`.
struct Chunks {
    int64_t* queue;
    int64_t chunks;
    struct {
        const int64_t* start;
    } student_rows;
    float* losses;
};
__device__ Chunks chunks_of(const Arguments& a) {
    return {reinterpret_cast<int64_t*>(a.count), a.n / 4, {reinterpret_cast<const int64_t*>(a.in)}, nullptr};
}

// A block takes chunks: out[k] is its number, out[n / 2 + block] how many it has taken.
__global__ void take_chunks(Arguments a) {
    int taken = 0;
    xtoken::cuda::each_chunk(chunks_of(a), [&](int64_t k) {
        ++taken;
        __syncthreads();
        if (threadIdx.x == 0) a.out[k] = blockIdx.x;
    });
    if (threadIdx.x == 0) a.out[a.n / 2 + blockIdx.x] = taken;
}

// ---- one fault each ----

// Chunks from a counter that is not changed atomically.
__global__ void take_chunks_not_atomically(Arguments a) {
    XTOKEN_SHARED(next, int64_t);
    const Chunks chunks = chunks_of(a);
    for (;;) {
        if (threadIdx.x == 0) next = (*chunks.queue)++;
        __syncthreads();
        const int64_t k = next;
        __syncthreads();
        if (k >= chunks.chunks) return;
        if (threadIdx.x == 0) a.out[k] = blockIdx.x;
    }
}

// All threads take one, each for itself.
__global__ void take_chunks_apart(Arguments a) {
    const Chunks chunks = chunks_of(a);
    for (;;) {
        const auto k = atomicAdd(reinterpret_cast<unsigned long long*>(chunks.queue), 1ull);
        if (k >= static_cast<unsigned long long>(chunks.chunks)) return;
        __syncthreads();
        a.out[k] = blockIdx.x;
    }
}

// Each thread reads what its neighbour wrote, without a barrier.
__global__ void missing_barrier(Arguments a) {
    XTOKEN_SHARED(values, float[64]);
    values[threadIdx.x] = a.in[threadIdx.x];
    a.out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// The second barrier of a loop is missing: the next round overwrites what slower threads still read.
__global__ void missing_second_barrier(Arguments a) {
    XTOKEN_SHARED(value, float);
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
        if (threadIdx.x == 0) value = a.in[i];
        __syncthreads();
        sum += value;
    }
    a.out[threadIdx.x] = sum;
}

// All threads add to one word, not atomically.
__global__ void race_in_shared(Arguments a) {
    XTOKEN_SHARED(sum, float);
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    sum += a.in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) a.out[0] = sum;
}

// Lanes of one warp: a shuffle is no memory barrier.
__global__ void race_in_warp(Arguments a) {
    XTOKEN_SHARED(values, float[32]);
    values[threadIdx.x] = a.in[threadIdx.x];
    const float first = __shfl_sync(all, a.in[threadIdx.x], 0);
    a.out[threadIdx.x] = values[31 - threadIdx.x] + first;
}

// Every block writes the same word.
__global__ void race_between_blocks(Arguments a) {
    if (threadIdx.x == 0) a.out[0] = a.in[blockIdx.x];
}

// As count_positive, without the fence.
__global__ void missing_fence(Arguments a) {
    if (threadIdx.x != 0) return;
    a.out[1 + blockIdx.x] = a.in[blockIdx.x];
    if (atomicAdd(a.count, 1u) != gridDim.x - 1) return;
    float total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += a.out[1 + block];
    a.out[0] = total;
}

// An atomic and an ordinary access to the same word.
__global__ void atomic_and_plain(Arguments a) {
    if (threadIdx.x == 0) {
        *a.count = 1;
    } else {
        atomicAdd(a.count, 1u);
    }
}

// Half of the threads end before the barrier.
__global__ void barrier_after_exit(Arguments a) {
    if (threadIdx.x >= blockDim.x / 2) return;
    __syncthreads();
    a.out[threadIdx.x] = 1;
}

// The two halves of a block are at different barriers.
__global__ void barrier_in_branch(Arguments a) {
    if (threadIdx.x < 32) {
        __syncthreads();
        a.out[threadIdx.x] = 1;
    } else {
        __syncthreads();
        a.out[threadIdx.x] = 2;
    }
}

// One warp waits for the block, the other for a lane that waits for the block.
__global__ void barrier_against_warp(Arguments a) {
    if (threadIdx.x % 32 == 5) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    a.out[threadIdx.x] = 1;
}

// Lane 7 does not reach the shuffle.
__global__ void shuffle_without_lane(Arguments a) {
    if (threadIdx.x == 7) return;
    a.out[threadIdx.x] = __shfl_xor_sync(all, a.in[threadIdx.x], 1);
}

// A lane reads from one that its mask does not name.
__global__ void shuffle_outside_mask(Arguments a) {
    if (threadIdx.x < 16) a.out[threadIdx.x] = __shfl_xor_sync(0xffffu, a.in[threadIdx.x], 16);
}

// One past the end.
__global__ void store_out_of_bounds(Arguments a) {
    for (int i = threadIdx.x; i <= a.n; i += blockDim.x) a.out[i] = 0;
}

// The value comes straight from a function that returns a class: g++ sees a call there, and no store.
__global__ void half_store_out_of_bounds(Arguments a) {
    auto* out = reinterpret_cast<__nv_bfloat16*>(a.out);
    out[0] = __float2bfloat16(a.in[1]);
    out[2 * a.n] = __float2bfloat16(a.in[0]);
}

// A tail that is read four elements at a time.
__global__ void load_out_of_bounds(Arguments a) {
    const float4 v = reinterpret_cast<const float4*>(a.in)[a.n / 4];
    a.out[0] = v.x;
}

__global__ void load_misaligned(Arguments a) {
    const float4 v = *reinterpret_cast<const float4*>(a.in + 1);
    a.out[0] = v.x;
}

__global__ void shared_out_of_bounds(Arguments a) {
    XTOKEN_SHARED(values, float[32]);
    values[threadIdx.x] = a.in[threadIdx.x];
    __syncthreads();
    a.out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void dynamic_out_of_bounds(Arguments a) {
    XTOKEN_DYNAMIC_SHARED(float, values);
    values[a.n] = 0;
}

__global__ void null_pointer(Arguments a) { *(a.n > 0 ? static_cast<float*>(nullptr) : a.out) = 1; }

__global__ void uninitialised_shared(Arguments a) {
    XTOKEN_SHARED(values, float[64]);
    if (threadIdx.x < 63) values[threadIdx.x] = a.in[threadIdx.x];
    __syncthreads();
    a.out[threadIdx.x] = values[63 - threadIdx.x];
}

// The previous block's shared memory is not this one's.
__global__ void left_by_previous_block(Arguments a) {
    XTOKEN_SHARED(value, float);
    if (threadIdx.x == 0 && blockIdx.x == 0) value = 1;
    __syncthreads();
    if (threadIdx.x == 0) a.out[blockIdx.x] = value;
}

__global__ void uninitialised_global(Arguments a) { a.out[threadIdx.x] += 1; }

// The read-only path is for memory that nobody writes in the launch.
__global__ void read_only_of_written(Arguments a) {
    a.out[threadIdx.x] = 1;
    __syncthreads();
    a.out[threadIdx.x] += __ldg(a.out + (threadIdx.x + 1) % blockDim.x);
}

// Every thread copies 16 bytes to a slot of its own, and reads them after wait().
template <typename Wait>
__device__ void copied(Arguments a, int in_step, int slot_step, Wait wait) {
    XTOKEN_SHARED(slots, float4[65]);
    auto* slot = reinterpret_cast<float*>(slots) + slot_step * threadIdx.x;
    xtoken::cuda::copy_async<16>(slot, a.in + in_step * (threadIdx.x % 16));
    xtoken::cuda::commit_copies();
    wait();
    a.out[threadIdx.x] = slot[0];
    xtoken::cuda::wait_copies<0>();
}

// The group that is read is the one that the wait leaves in flight.
__global__ void copy_read_too_early(Arguments a) {
    copied(a, 4, 4, [] { xtoken::cuda::wait_copies<1>(); });
}

__global__ void copy_without_wait(Arguments a) {
    copied(a, 4, 4, [] {});
}

// A wait is for groups: what is not committed is not waited for.
__global__ void copy_not_committed(Arguments a) {
    XTOKEN_SHARED(slots, float4[64]);
    xtoken::cuda::copy_async<16>(slots + threadIdx.x, a.in + 4 * (threadIdx.x % 16));
    xtoken::cuda::wait_copies<0>();
    a.out[threadIdx.x] = slots[threadIdx.x].x;
}

__global__ void copy_over_a_copy(Arguments a) {
    XTOKEN_SHARED(slots, float4[64]);
    xtoken::cuda::copy_async<16>(slots + threadIdx.x, a.in);
    xtoken::cuda::copy_async<16>(slots + threadIdx.x, a.in + 4);
}

// The wait is the thread's own: others need a barrier as well.
__global__ void copy_of_a_neighbour(Arguments a) {
    XTOKEN_SHARED(slots, float4[64]);
    xtoken::cuda::copy_async<16>(slots + threadIdx.x, a.in + 4 * (threadIdx.x % 16));
    xtoken::cuda::commit_copies();
    xtoken::cuda::wait_copies<0>();
    a.out[threadIdx.x] = slots[(threadIdx.x + 1) % 64].x;
}

__global__ void copy_of_what_changes(Arguments a) {
    XTOKEN_SHARED(slots, float4[64]);
    a.out[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0) xtoken::cuda::copy_async<16>(slots, a.out);
    xtoken::cuda::commit_copies();
    __syncthreads();
    a.out[threadIdx.x] = 2;
    xtoken::cuda::wait_copies<0>();
}

__global__ void copy_never_waited_for(Arguments a) {
    XTOKEN_SHARED(slots, float4[64]);
    xtoken::cuda::copy_async<16>(slots + threadIdx.x, a.in);
    xtoken::cuda::commit_copies();
}

__global__ void copy_misaligned(Arguments a) {
    copied(a, 3, 4, [] { xtoken::cuda::wait_copies<0>(); });
}

__global__ void copy_to_misaligned(Arguments a) {
    copied(a, 4, 3, [] { xtoken::cuda::wait_copies<0>(); });
}

__global__ void copy_out_of_bounds(Arguments a) {
    copied(a, 16, 4, [] { xtoken::cuda::wait_copies<0>(); });
}

__global__ void copy_from_shared(Arguments) {
    XTOKEN_SHARED(slots, float4[2]);
    if (threadIdx.x == 0) {
        slots[1] = make_float4(0, 0, 0, 0);
        xtoken::cuda::copy_async<16>(slots, slots + 1);
    }
}

__global__ void copy_to_global(Arguments a) { xtoken::cuda::copy_async<16>(a.out, a.in); }

__global__ void too_much_shared(Arguments a) {
    XTOKEN_SHARED(values, float[12289]);
    values[threadIdx.x] = 0;
    a.out[threadIdx.x] = values[threadIdx.x];
}

__global__ void trapped(Arguments) { __trap(); }

// Functions whose results are approximate, one for each input.
__global__ void approximate(Arguments a) {
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
        const float x = a.in[i];
        const float results[] = {xtoken::cuda::fast_exp2(x), xtoken::cuda::fast_log2(x), expf(x), logf(x),
                                 xtoken::cuda::fast_divide(x, 3.0f)};
        a.out[i] = results[i % 5];
    }
}

struct Named {
    const char* name;
    void (*kernel)(Arguments);
};
#define KERNEL(name) {#name, name}
const Named kernels[] = {KERNEL(block_sum),
                         KERNEL(reverse),
                         KERNEL(reverse_by_four),
                         KERNEL(reverse_by_copies),
                         KERNEL(count_positive),
                         KERNEL(rotate_warp),
                         KERNEL(first_warp_scans),
                         KERNEL(votes),
                         KERNEL(approximate),
                         KERNEL(take_chunks),
                         KERNEL(take_chunks_not_atomically),
                         KERNEL(take_chunks_apart),
                         KERNEL(missing_barrier),
                         KERNEL(missing_second_barrier),
                         KERNEL(race_in_shared),
                         KERNEL(race_in_warp),
                         KERNEL(race_between_blocks),
                         KERNEL(missing_fence),
                         KERNEL(atomic_and_plain),
                         KERNEL(barrier_after_exit),
                         KERNEL(barrier_in_branch),
                         KERNEL(barrier_against_warp),
                         KERNEL(shuffle_without_lane),
                         KERNEL(shuffle_outside_mask),
                         KERNEL(store_out_of_bounds),
                         KERNEL(half_store_out_of_bounds),
                         KERNEL(load_out_of_bounds),
                         KERNEL(load_misaligned),
                         KERNEL(shared_out_of_bounds),
                         KERNEL(dynamic_out_of_bounds),
                         KERNEL(null_pointer),
                         KERNEL(uninitialised_shared),
                         KERNEL(left_by_previous_block),
                         KERNEL(uninitialised_global),
                         KERNEL(read_only_of_written),
                         KERNEL(copy_read_too_early),
                         KERNEL(copy_without_wait),
                         KERNEL(copy_not_committed),
                         KERNEL(copy_over_a_copy),
                         KERNEL(copy_of_a_neighbour),
                         KERNEL(copy_of_what_changes),
                         KERNEL(copy_never_waited_for),
                         KERNEL(copy_misaligned),
                         KERNEL(copy_to_misaligned),
                         KERNEL(copy_out_of_bounds),
                         KERNEL(copy_from_shared),
                         KERNEL(copy_to_global),
                         KERNEL(too_much_shared),
                         KERNEL(trapped)};

char failure[1 << 16];

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* last_failure() { return failure; }

// Launches the kernel of this name; returns a cudaError_t, or -1 after a report.
extern "C" __attribute__((visibility("default"))) int launch(const char* name, unsigned grid, unsigned block,
                                                             unsigned shared_bytes, const float* in, float* out,
                                                             unsigned* count, int n) {
    for (const Named& named : kernels) {
        if (std::string_view(named.name) != name) continue;
        try {
            return xtoken::cuda::launch(named.kernel, dim3(grid), dim3(block), shared_bytes, nullptr,
                                        Arguments{in, out, count, n});
        } catch (const std::exception& error) {
            std::strncpy(failure, error.what(), sizeof(failure) - 1);
            return -1;
        }
    }
    return -2;
}
