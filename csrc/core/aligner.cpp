// Alignment of batches: masks and padding, the choice of method, threads.
#include "core/aligner.h"

#include <algorithm>
#include <limits>

#include "core/align_bytes.h"
#include "core/align_dp.h"
#include "core/error.h"
#include "core/parallel.h"

namespace xtoken {
namespace {

// Tokens of both sides that make it worth while to wake another thread.
constexpr int64_t kTokensPerRange = 1 << 15;

// The unmasked tokens of one sample of one side.
struct Sequence {
    std::vector<int32_t> symbols;
    std::vector<int32_t> positions;  // of each symbol within the sample

    int32_t size() const { return static_cast<int32_t>(symbols.size()); }
    bool follows_a_token(int32_t i) const {
        const size_t k = static_cast<size_t>(i);
        return i > 0 && positions[k - 1] + 1 == positions[k];
    }
    // Turns a range of symbols into a range of positions; false if masked tokens lie within.
    bool to_positions(int32_t& start, int32_t& end) const {
        const int32_t count = end - start;
        end = positions[static_cast<size_t>(end) - 1] + 1;
        start = positions[static_cast<size_t>(start)];
        return end - start == count;
    }
};

}  // namespace

struct Aligner::Workspace {
    Sequence student, teacher;
    std::vector<Span> chunks, gaps;
    std::vector<uint8_t> predicted;
};

Aligner::Aligner(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules)
    : pair_(student, teacher, rules),
      student_padding_(find_padding(student)),
      teacher_padding_(find_padding(teacher)) {}

Aligner::Padding Aligner::find_padding(const Vocabulary& vocabulary) {
    Padding padding;
    for (const auto& [role, id] : vocabulary.roles()) {
        if (role == "pad") padding.id = id;
    }
    for (const auto& [role, id] : vocabulary.roles()) {
        if (id != padding.id) continue;
        padding.is_bos |= role == "bos";
        padding.is_end |= role == "eos" || role == "end_of_turn";
    }
    return padding;
}

bool Aligner::align_sample(const TokenBatch& student, const TokenBatch& teacher, int64_t sample, AlignMethod method,
                           int64_t cell_budget, Workspace& work) const {
    const auto load = [&](const TokenBatch& batch, const Padding& padding, const char* name, int32_t vocabulary_size,
                          auto symbol_of, Sequence& out) {
        const int64_t* ids = batch.ids + batch.offsets[sample];
        const int64_t length = batch.offsets[sample + 1] - batch.offsets[sample];
        if (length > std::numeric_limits<int32_t>::max())
            value_error(name, ": sample ", sample, " has over 2^31 tokens");
        int64_t begin = 0, end = length;
        if (!batch.mask) {
            // A run of pad tokens at an end is padding, but the one next to the text may be a real eos or bos.
            while (end > 0 && ids[end - 1] == padding.id) --end;
            if (padding.is_end && end > 0 && end < length) ++end;
            while (begin < end && ids[begin] == padding.id) ++begin;
            if (padding.is_bos && begin > 0) --begin;
        }
        out.symbols.clear();
        out.positions.clear();
        for (int64_t i = begin; i < end; ++i) {
            if (batch.mask && !batch.mask[batch.offsets[sample] + i]) continue;
            if (ids[i] < 0 || ids[i] >= vocabulary_size) {
                value_error(name, ": token id ", ids[i], " at sample ", sample, ", position ", i,
                            " is outside the vocabulary of ", vocabulary_size, " tokens");
            }
            out.symbols.push_back(symbol_of(ids[i]));
            out.positions.push_back(static_cast<int32_t>(i));
        }
    };
    load(
        student, student_padding_, "student_ids", pair_.student_size(),
        [&](int64_t id) { return pair_.student_symbol(id); }, work.student);
    load(
        teacher, teacher_padding_, "teacher_ids", pair_.teacher_size(),
        [&](int64_t id) { return pair_.teacher_symbol(id); }, work.teacher);

    work.chunks.clear();
    work.gaps.clear();
    work.predicted.clear();
    const int32_t* symbols[] = {work.student.symbols.data(), work.teacher.symbols.data()};
    const int32_t sizes[] = {work.student.size(), work.teacher.size()};
    bool optimal = true;
    // Adds the dynamic program's chunks over part of the sample.
    const auto bridge = [&](Span part) {
        const size_t before = work.chunks.size();
        optimal &=
            align_dp(pair_, symbols[0] + part.student_start, part.student_end - part.student_start,
                     symbols[1] + part.teacher_start, part.teacher_end - part.teacher_start, cell_budget, work.chunks)
                .optimal;
        for (size_t k = before; k < work.chunks.size(); ++k) {
            work.chunks[k].student_start += part.student_start;
            work.chunks[k].student_end += part.student_start;
            work.chunks[k].teacher_start += part.teacher_start;
            work.chunks[k].teacher_end += part.teacher_start;
        }
    };
    if (method == AlignMethod::dp) {
        bridge({0, sizes[0], 0, sizes[1]});
    } else {
        align_bytes(pair_, symbols[0], sizes[0], symbols[1], sizes[1], work.chunks, work.gaps);
    }
    if (method == AlignMethod::automatic) {
        const size_t merged = work.chunks.size();
        for (const Span& gap : work.gaps) {
            if (gap.student_end > gap.student_start && gap.teacher_end > gap.teacher_start) bridge(gap);
        }
        std::inplace_merge(work.chunks.begin(), work.chunks.begin() + static_cast<std::ptrdiff_t>(merged),
                           work.chunks.end(),
                           [](const Span& x, const Span& y) { return x.student_start < y.student_start; });
    }

    size_t kept = 0;
    for (Span chunk : work.chunks) {
        const bool predicted =
            work.student.follows_a_token(chunk.student_start) && work.teacher.follows_a_token(chunk.teacher_start);
        const bool whole = work.student.to_positions(chunk.student_start, chunk.student_end) &&
                           work.teacher.to_positions(chunk.teacher_start, chunk.teacher_end);
        if (!whole) continue;
        work.chunks[kept++] = chunk;
        work.predicted.push_back(predicted);
    }
    work.chunks.resize(kept);
    return optimal;
}

BatchAlignment Aligner::align(const TokenBatch& student, const TokenBatch& teacher, int64_t samples, AlignMethod method,
                              int64_t cell_budget, int threads) const {
    // Consecutive samples form a range; the ranges' results are put together in order, whatever thread made them.
    const int64_t tokens = samples ? student.offsets[samples] + teacher.offsets[samples] : 0;
    const int64_t ranges_wanted = std::clamp<int64_t>(tokens / kTokensPerRange, 1, std::max<int64_t>(1, samples));
    const int64_t grain = (std::max<int64_t>(1, samples) + ranges_wanted - 1) / ranges_wanted;
    const int64_t ranges = (samples + grain - 1) / grain;

    BatchAlignment result;
    result.offsets.assign(static_cast<size_t>(samples) + 1, 0);
    result.optimal.assign(static_cast<size_t>(samples), 1);
    std::vector<BatchAlignment> parts(static_cast<size_t>(ranges));
    parallel_for(ranges, 1, threads, [&](int64_t first_range, int64_t last_range) {
        Workspace work;
        for (int64_t range = first_range; range < last_range; ++range) {
            BatchAlignment& part = parts[static_cast<size_t>(range)];
            for (int64_t sample = range * grain; sample < std::min(samples, (range + 1) * grain); ++sample) {
                const bool optimal = align_sample(student, teacher, sample, method, cell_budget, work);
                result.optimal[static_cast<size_t>(sample)] = optimal;
                part.spans.insert(part.spans.end(), work.chunks.begin(), work.chunks.end());
                part.predicted.insert(part.predicted.end(), work.predicted.begin(), work.predicted.end());
                result.offsets[static_cast<size_t>(sample) + 1] = static_cast<int64_t>(work.chunks.size());
            }
        }
    });
    for (size_t sample = 0; sample < static_cast<size_t>(samples); ++sample) {
        result.offsets[sample + 1] += result.offsets[sample];
    }
    if (ranges == 1) {
        result.spans = std::move(parts[0].spans);
        result.predicted = std::move(parts[0].predicted);
        return result;
    }
    result.spans.resize(static_cast<size_t>(result.offsets.back()));
    result.predicted.resize(static_cast<size_t>(result.offsets.back()));
    parallel_for(ranges, 1, threads, [&](int64_t first_range, int64_t last_range) {
        for (int64_t range = first_range; range < last_range; ++range) {
            const BatchAlignment& part = parts[static_cast<size_t>(range)];
            const auto place = static_cast<std::ptrdiff_t>(result.offsets[static_cast<size_t>(range * grain)]);
            std::copy(part.spans.begin(), part.spans.end(), result.spans.begin() + place);
            std::copy(part.predicted.begin(), part.predicted.end(), result.predicted.begin() + place);
        }
    });
    return result;
}

}  // namespace xtoken
