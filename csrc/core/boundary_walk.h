// The boundary rule of a piece index, for the core and for device code: where inside a chunk tokens are compared.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define XTOKEN_HOST_DEVICE __host__ __device__
#else
#define XTOKEN_HOST_DEVICE
#endif

namespace xtoken {

// Pieces, tokens of the side `other`, come by their events; those of one event by their ids, and last what it cannot
// spell.
template <typename Side>
struct PieceOrder {
    const Side& other;

    template <typename Int>
    XTOKEN_HOST_DEVICE bool operator()(Int a, Int b) const {
        if (a == b || a >= other.size || b >= other.size) return a < b;
        return other.event[a] != other.event[b] ? other.event[a] < other.event[b] : a < b;
    }
};

// How the first `depth` pieces of a token stand to some known ones: -1, 0, 1.
template <typename Side, typename Int>
XTOKEN_HOST_DEVICE int compare_beginning(const Side& side, const Side& other, int32_t token, const int64_t* known,
                                         Int depth) {
    for (Int d = 0; d < depth; ++d) {
        const int32_t at = side.ptr[token] + static_cast<int32_t>(d);
        if (at >= side.ptr[token + 1]) return -1;
        const int64_t piece = side.pieces[at];
        if (piece != known[d]) return PieceOrder<Side>{other}(piece, known[d]) ? -1 : 1;
    }
    return 0;
}

// Finds, one after the other, the places where a token of one side (`part`) starts within a token of the other side
// (`whole`), whose pieces begin with the `depth` tokens of `part` since. Only where the token that goes on began where
// a token of the other side began. Side: see PieceSide in core/piece_index.h; the tokens are those of a chunk.
template <typename Int>
struct BoundaryWalk {
    Int whole, part;  // numbers of the tokens
    Int depth;        // -1: the tokens before `part` do not lead to where `whole` starts, or do not spell it
    Int whole_start, part_start;  // bytes

    XTOKEN_HOST_DEVICE void start() { *this = {0, 0, -1, 0, 0}; }

    // The next one; at the end `whole` is `count`.
    template <typename Side>
    XTOKEN_HOST_DEVICE void advance(const Side& side, const int64_t* tokens, Int count, const Side& other,
                                    const int64_t* others, Int other_count) {
        while (whole < count) {
            const int64_t token = tokens[whole];
            const Int end = whole_start + side.length[token];
            if (depth < 0) {
                while (part < other_count && part_start < whole_start) part_start += other.length[others[part++]];
                if (part_start == whole_start) depth = 0;
            }
            const Int at = side.ptr[token] + depth;
            if (depth >= 0 && part < other_count && at < side.ptr[token + 1] && side.pieces[at] == others[part]) {
                part_start += other.length[others[part++]];
                ++depth;
                if (part < other_count && part_start < end) return;
            }
            depth = -1;
            whole_start = end;
            ++whole;
        }
    }
};

}  // namespace xtoken
