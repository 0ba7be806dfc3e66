// How kernels read and write elements of rows: their types, and 16 bytes at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/platform.cuh"
#include "launch/arguments.h"

namespace xtoken::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half(x); }

// N = 2 or 4 words, in one load.
template <int N>
__device__ void load_words(const void* from, uint32_t* words) {
    using Vector = std::conditional_t<N == 4, uint4, uint2>;
    static_assert(sizeof(Vector) == N * sizeof(uint32_t), "a vector of CUDA's");
    const Vector raw = *static_cast<const Vector*>(from);
    memcpy(words, &raw, sizeof raw);
}

// N elements from `values + i`, 16 bytes at a time where i allows it; `values` itself is aligned.
template <int N, typename T>
__device__ void load_lanes(const T* values, int i, T (&out)[N]) {
    static_assert(sizeof(T) == 4, "four to a vector");
    if constexpr (N % 4 == 0) {
        if (i % 4 == 0) {
#pragma unroll
            for (int k = 0; k < N; k += 4) {
                const uint4 raw = *reinterpret_cast<const uint4*>(values + i + k);
                memcpy(&out[k], &raw, sizeof raw);
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = values[i + k];
}

template <int N>
__device__ void store_lanes(float* values, int i, const float (&x)[N]) {
    if constexpr (N % 4 == 0) {
        if (i % 4 == 0) {
#pragma unroll
            for (int k = 0; k < N; k += 4) {
                *reinterpret_cast<float4*>(values + i + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) values[i + k] = x[k];
}

template <typename T>
__device__ T* row_of(const Logits& logits, int64_t r) {
    return static_cast<T*>(logits.data) + r / logits.length * logits.sample_stride +
           r % logits.length * logits.row_stride;
}

// A thread's loads in flight: asynchronous copies into shared memory, `depth` deep, each of one or more slots of 16
// bytes. A thread reads only what it has copied itself, so there is no barrier. (Registers cannot be such a ring: an
// instruction that moves what a load is to fill waits for it.)
class Ring {
  public:
    static constexpr int depth = 4;
    // Shared memory for so many slots a copy. Those of the largest block, so that distances are constants.
    static __host__ __device__ constexpr size_t bytes(int slots) { return size_t{16} * depth * slots * max_threads; }

    __device__ Ring() {
        XTOKEN_DYNAMIC_SHARED(uint4, memory);
        first_ = memory + threadIdx.x;
    }
    // Slot k of the oldest copy, which is the newest one's after push.
    __device__ uint4* slot(int k) const { return first_ + place_ * max_threads + k * depth * max_threads; }
    // What was started since the last call is the newest copy.
    __device__ void push() {
        static_assert((depth & (depth - 1)) == 0, "a power of two");
        commit_copies();
        place_ = (place_ + 1) & (depth - 1);
    }
    // The oldest copy is there.
    __device__ void wait() const { wait_copies<depth - 1>(); }

  private:
    uint4* first_;
    int place_ = 0;
};

// Whether each_pair copies a second row ahead.
enum class Copied { never, if_aligned, always };

// 16 bytes; `keep` is known where this is compiled.
__device__ inline void copy_kept(Keep keep, void* to, const void* from) {
    switch (keep) {
        case Keep::usual:
            return copy_async<16>(to, from);
        case Keep::briefly:
            return copy_async<16, false, Keep::briefly>(to, from);
        case Keep::partly:
            return copy_async<16, false, Keep::partly>(to, from);
    }
}

__device__ inline uint16_t load_kept(Keep keep, const uint16_t* from) {
    switch (keep) {
        case Keep::usual:
            return load_kept<Keep::usual>(from);
        case Keep::briefly:
            return load_kept<Keep::briefly>(from);
        case Keep::partly:
            return load_kept<Keep::partly>(from);
    }
    return 0;
}

// A row of elements of a type that the kernel is compiled for.
template <typename T>
struct Row {
    static constexpr int vector = 16 / sizeof(T);  // elements that are loaded together
    template <int N>
    using Elements = float[N];
    using Element = T;
    const T* data;
    Keep keep = Keep::usual;  // in L2, what is copied

    __device__ explicit Row(const T* row) : data(base(row)) {}
    __device__ Row(const Logits& logits, int64_t r) : Row(row_of<T>(logits, r)) {}

    __device__ float operator[](int i) const { return widen(data[i]); }
    // Whether exponentials need more than one instruction.
    __device__ constexpr bool precise() const { return sizeof(T) == 4; }
    // Elements at N places, -inf where a place is negative.
    template <int N>
    __device__ void gather_or_lowest(const int32_t (&places)[N], T (&x)[N]) const {
        T lowest;
        narrow(-INFINITY, lowest);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = places[k] < 0 ? lowest : data[places[k]];
    }
    // Elements before the first at a 16-byte boundary.
    __device__ int head() const {
        return static_cast<int>((uintptr_t{0} - reinterpret_cast<uintptr_t>(data)) % 16 / sizeof(T));
    }
    // Starts to copy the vector from i on into a slot, and takes it from there.
    __device__ void load(const Ring& ring, int i) const { copy_kept(keep, ring.slot(0), data + i); }
    __device__ Row kept(Keep how) const {
        Row row = *this;
        row.keep = how;
        return row;
    }
    // What begins with element i.
    __device__ Row from(int i) const {
        Row row = *this;
        row.data = in_register(data + i);
        return row;
    }
    __device__ void take(const Ring& ring, float (&x)[vector]) const {
        uint32_t words[4];
        read_copied(ring.slot(0), words);
        widened(words, x);
    }
    // N elements from i on, in one load where they are a whole aligned vector.
    template <int N>
    __device__ void elements(int i, float (&x)[N]) const {
        if constexpr (N == vector) {
            if (reinterpret_cast<uintptr_t>(data + i) % 16 == 0) {
                uint32_t words[4];
                load_words<4>(data + i, words);
                return widened(words, x);
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = widen(data[i + k]);
    }

  private:
    __device__ void widened(const uint32_t (&words)[4], float (&x)[vector]) const {
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // an instruction each
#pragma unroll
            for (int k = 0; k < vector; ++k) {
                x[k] = __uint_as_float(k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u);
            }
        } else {
            T lanes[vector];
            memcpy(static_cast<void*>(lanes), words, sizeof lanes);
#pragma unroll
            for (int k = 0; k < vector; ++k) x[k] = widen(lanes[k]);
        }
    }
};

// A row of elements of any type: the teacher's, so that a kernel is compiled for three types and not for nine pairs.
// The type is the same for all threads; it is asked for once per eight elements.
struct AnyRow {
    static constexpr int vector = 8;
    static constexpr Copied copied = Copied::if_aligned;
    template <int N>
    using Elements = float[N];
    const char* data;
    Element type;
    Keep keep = Keep::usual;  // in L2, what is copied or gathered of 16 bits

    __device__ AnyRow(const Logits& logits, int64_t r) : type(logits.type) {
        const int64_t offset = r / logits.length * logits.sample_stride + r % logits.length * logits.row_stride;
        data = base(static_cast<const char*>(logits.data) + offset * size());
    }

    __device__ explicit AnyRow(const float* row) : data(reinterpret_cast<const char*>(row)), type(Element::float32) {}

    __device__ bool precise() const { return type == Element::float32; }
    __device__ int size() const { return type == Element::float32 ? 4 : 2; }
    __device__ const char* at(int i) const { return data + static_cast<int64_t>(i) * size(); }

    __device__ float operator[](int i) const {
        uint32_t bits;
        if (type == Element::float32) {
            bits = *reinterpret_cast<const uint32_t*>(at(i));
        } else {
            bits = *reinterpret_cast<const uint16_t*>(at(i));
        }
        float x[2] = {__uint_as_float(bits), 0.0f};
        if (type != Element::float32) widened<2>(&bits, x);
        return x[0];
    }
    __device__ int head() const {
        return static_cast<int>((uintptr_t{0} - reinterpret_cast<uintptr_t>(data)) % 16) / size();
    }
    // As those of Row, for N elements (4 or 8) and slots from `first` on, as many as `slots`.
    static constexpr int slots(Element type) { return type == Element::float32 ? 2 : 1; }
    template <int N = vector>
    __device__ void load(const Ring& ring, int i, int first = 0) const {
        if (type == Element::float32) {
#pragma unroll
            for (int k = 0; k < N / 4; ++k) copy_async<16, (N > 4)>(ring.slot(first + k), at(i + 4 * k));
        } else {
            if constexpr (N == 8) {
                copy_kept(keep, ring.slot(first), at(i));
            } else {
                copy_async<2 * N>(ring.slot(first), at(i));
            }
        }
    }
    template <int N>
    __device__ void take(const Ring& ring, float (&x)[N], int first = 0) const {
        uint32_t words[N];
        if (type == Element::float32) {
#pragma unroll
            for (int k = 0; k < N; k += 4) {
                uint32_t part[4];
                read_copied(ring.slot(first + k / 4), part);
                memcpy(words + k, part, sizeof part);
            }
        } else {
            uint32_t part[N / 2];
            read_copied(ring.slot(first), part);
            memcpy(words, part, sizeof part);
        }
        widened<N>(words, x);
    }
    // As the second row of each_pair.
    template <int N>
    __device__ void take_beside(const Ring& ring, int, float (&x)[N]) const {
        take(ring, x, 1);
    }
    __device__ AnyRow kept(Keep how) const {
        AnyRow row = *this;
        row.keep = how;
        return row;
    }
    // Whether the vectors of N elements from i on, and all that follow, can be copied.
    template <int N>
    __device__ bool aligned(int i) const {
        return reinterpret_cast<uintptr_t>(at(i)) % (N * size() < 16 ? 8 : 16) == 0;
    }
    template <int N>
    __device__ void elements(int i, float (&x)[N]) const {
        if constexpr (N % 4 == 0) {
            if (aligned<N>(i)) {
                uint32_t words[N];
                load_aligned<N>(i, words);
                return widened<N>(words, x);
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = (*this)[i + k];
    }
    // Elements at N places, 0 where a place is negative.
    template <int N>
    __device__ void gather(const int32_t* places, float (&x)[N]) const {
        uint32_t bits[N] = {};
        gather_bits(places, bits);
        gathered(bits, x);
    }
    // The same in two steps: the loads may be long under way before their elements are used. Where a place is negative
    // bits stay as they are, or with `or_lowest` become those of -inf.
    template <bool or_lowest = false, int N>
    __device__ void gather_bits(const int32_t* places, uint32_t (&bits)[N]) const {
        if (type == Element::float32) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if constexpr (or_lowest) bits[k] = 0xff800000u;
                if (places[k] >= 0) bits[k] = reinterpret_cast<const uint32_t*>(data)[places[k]];
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if constexpr (or_lowest) bits[k] = type == Element::bfloat16 ? 0xff80u : 0xfc00u;
                if (places[k] >= 0) bits[k] = load_kept(keep, reinterpret_cast<const uint16_t*>(data) + places[k]);
            }
        }
    }
    template <int N>
    __device__ void gathered(const uint32_t (&bits)[N], float (&x)[N]) const {
        if (type == Element::float16) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                __half2 pair;
                memcpy(static_cast<void*>(&pair), bits + k, sizeof pair);
                x[k] = __low2float(pair);
            }
        } else {
            const int shift = type == Element::float32 ? 0 : 16;
#pragma unroll
            for (int k = 0; k < N; ++k) x[k] = __uint_as_float(bits[k] << shift);
        }
    }
    // As that of Row.
    template <int N>
    __device__ void gather_or_lowest(const int32_t* places, float (&x)[N]) const {
        uint32_t bits[N];
        gather_bits<true>(places, bits);
        gathered(bits, x);
    }

  private:
    // N elements from an aligned place, N a multiple of 4.
    template <int N>
    __device__ void load_aligned(int i, uint32_t* words) const {
        const char* from = at(i);
        if (type == Element::float32) {
#pragma unroll
            for (int k = 0; k < N; k += 4) load_words<4>(from + 4 * k, words + k);
        } else {
            load_words<N / 2>(from, words);
        }
    }
    template <int N>
    __device__ void widened(const uint32_t* words, float (&x)[N]) const {
        if (type == Element::float32) {
#pragma unroll
            for (int k = 0; k < N; ++k) x[k] = __uint_as_float(words[k]);
        } else if (type == Element::bfloat16) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                x[k] = __uint_as_float(k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u);
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; k += 2) {
                __half2 pair;
                memcpy(static_cast<void*>(&pair), words + k / 2, sizeof pair);
                x[k] = __low2float(pair);
                x[k + 1] = __high2float(pair);
            }
        }
    }
};

// A bit for each element of a row: bits 8 v ... 8 v + 31 are word v, so that those of a vector are in one word. Beside
// a row of each_pair.
template <bool ahead = true>  // whether they are copied, as a slot has room for them
struct BitRow {
    static constexpr Copied copied = ahead ? Copied::always : Copied::never;
    const int32_t* words;

    template <int N>
    struct Elements {
        static_assert(N <= 8, "in a word");
        unsigned bits;
        __device__ bool operator[](int k) const { return (bits >> k & 1u) != 0; }
        // sum + x where bit k is set
        __device__ float add(int k, float x, float sum) const { return (*this)[k] ? sum + x : sum; }
    };
    template <int N>
    __device__ void load(const Ring& ring, int i, int first) const {
        copy_async<4>(ring.slot(first), words + static_cast<unsigned>(i) / 8);
    }
    template <int N>
    __device__ void take_beside(const Ring& ring, int i, Elements<N>& x) const {
        uint32_t word[1];
        read_copied(ring.slot(1), word);
        x.bits = word[0] >> i % 8;
    }
    template <int N>
    __device__ void elements(int i, Elements<N>& x) const {
        x.bits = static_cast<unsigned>(words[i / 8]) >> i % 8;
    }
    __device__ bool operator[](int i) const { return (static_cast<unsigned>(words[i / 8]) >> i % 8 & 1u) != 0; }
};

// Calls body with row r of `logits` as a Row of its own type; a pass over a long row has no choices then.
template <typename Body>
__device__ void typed_row(const Logits& logits, int64_t r, Body body) {
    if (logits.type == Element::bfloat16) return body(Row<__nv_bfloat16>(logits, r));
    if (logits.type == Element::float16) return body(Row<__half>(logits, r));
    body(Row<float>(logits, r));
}

// Calls body with a null pointer to the type of the elements. XTOKEN_USUAL_ALONE leaves the others out, and
// kernels of options that are seldom used, where what the compiler makes of kernels is looked at: they are most of its
// time.
template <typename Body>
void typed([[maybe_unused]] Element element, Body body) {
#ifdef XTOKEN_USUAL_ALONE
    body(static_cast<const __nv_bfloat16*>(nullptr));
#else
    switch (element) {
        case Element::float32:
            return body(static_cast<const float*>(nullptr));
        case Element::bfloat16:
            return body(static_cast<const __nv_bfloat16*>(nullptr));
        case Element::float16:
            return body(static_cast<const __half*>(nullptr));
    }
#endif
}

}  // namespace xtoken::cuda
