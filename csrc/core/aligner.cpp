// Alignment of batches: masks and padding, the choice of method, threads.
#include "core/aligner.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>

#include "core/align_bytes.h"
#include "core/align_dp.h"
#include "core/error.h"
#include "core/parallel.h"

namespace xtoken {
namespace {

// Tokens of both sides in a range of samples: enough to be worth waking another thread, few enough for the result to be
// still in cache when it is copied to its place.
constexpr int64_t kTokensPerRange = 1 << 15;

// The unmasked tokens of one sample of one side.
struct Sequence {
    std::vector<int32_t> symbols;
    int32_t begin = 0;               // position of the first symbol within the sample
    std::vector<int32_t> positions;  // of each symbol, if masked tokens may lie between them; else empty

    int32_t size() const { return static_cast<int32_t>(symbols.size()); }
    bool follows_a_token(int32_t i) const {
        const size_t k = static_cast<size_t>(i);
        return i > 0 && (positions.empty() || positions[k - 1] + 1 == positions[k]);
    }
    // Turns a range of symbols into a range of positions; false if masked tokens lie within.
    bool to_positions(int32_t& start, int32_t& end) const {
        if (positions.empty()) {
            start += begin;
            end += begin;
            return true;
        }
        const int32_t count = end - start;
        end = positions[static_cast<size_t>(end) - 1] + 1;
        start = positions[static_cast<size_t>(start)];
        return end - start == count;
    }

    // `symbol_of` has one symbol for each id of the vocabulary; `name` and `sample` are for the message.
    template <typename Padding>
    void load(const TokenRow& row, const Padding& padding, const std::vector<int32_t>& symbol_of, const char* name,
              int64_t sample) {
        if (row.length > std::numeric_limits<int32_t>::max()) {
            value_error(name, ": sample ", sample, " has over 2^31 tokens");
        }
        int64_t first = 0, end = row.length;
        if (!row.mask) {
            // A run of pad tokens at an end is padding, but the one next to the text may be a real eos or bos.
            while (end > 0 && row.ids[end - 1] == padding.id) --end;
            if (padding.is_end && end > 0 && end < row.length) ++end;
            while (first < end && row.ids[first] == padding.id) ++first;
            if (padding.is_bos && first > 0) --first;
        }
        begin = static_cast<int32_t>(first);
        positions.clear();
        symbols.resize(static_cast<size_t>(end - first));
        size_t count = 0;
        for (int64_t i = first; i < end; ++i) {
            if (row.mask && !row.mask[i]) continue;
            if (row.ids[i] < 0 || row.ids[i] >= static_cast<int64_t>(symbol_of.size())) {
                value_error(name, ": token id ", row.ids[i], " at sample ", sample, ", position ", i,
                            " is outside the vocabulary of ", symbol_of.size(), " tokens");
            }
            symbols[count++] = symbol_of[static_cast<size_t>(row.ids[i])];
            if (row.mask) positions.push_back(static_cast<int32_t>(i));
        }
        symbols.resize(count);
    }
};

}  // namespace

// The chunks of a range of samples.
struct Aligner::Part {
    std::vector<Span> spans;
    std::vector<uint8_t> predicted;
};

struct Aligner::Workspace {
    Sequence student, teacher;
    std::vector<Span> gaps;
};

Aligner::Aligner(const Vocabulary& student, const Vocabulary& teacher, CanonicalRules rules)
    : pair_(student, teacher, rules),
      student_padding_(find_padding(student)),
      teacher_padding_(find_padding(teacher)),
      order_(student < teacher   ? SideOrder::student
             : teacher < student ? SideOrder::teacher
                                 : SideOrder::by_symbol) {}

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

bool Aligner::bridge(const Span& gap, int64_t cell_budget, const Workspace& work, std::vector<Span>& chunks) const {
    const int32_t* student = work.student.symbols.data() + gap.student_start;
    const int32_t* teacher = work.teacher.symbols.data() + gap.teacher_start;
    const int32_t n = gap.student_end - gap.student_start, m = gap.teacher_end - gap.teacher_start;
    const bool turned =
        order_ == SideOrder::teacher ||
        (order_ == SideOrder::by_symbol && std::lexicographical_compare(teacher, teacher + m, student, student + n));
    const size_t before = chunks.size();
    const bool optimal = turned ? align_dp(pair_, teacher, m, student, n, cell_budget, chunks).optimal
                                : align_dp(pair_, student, n, teacher, m, cell_budget, chunks).optimal;
    for (size_t k = before; k < chunks.size(); ++k) {
        Span& chunk = chunks[k];
        if (turned) {
            std::swap(chunk.student_start, chunk.teacher_start);
            std::swap(chunk.student_end, chunk.teacher_end);
        }
        chunk.student_start += gap.student_start;
        chunk.student_end += gap.student_start;
        chunk.teacher_start += gap.teacher_start;
        chunk.teacher_end += gap.teacher_start;
    }
    return optimal;
}

bool Aligner::align_sample(const TokenRow& student, const TokenRow& teacher, int64_t sample, AlignMethod method,
                           int64_t cell_budget, Workspace& work, Part& part) const {
    work.student.load(student, student_padding_, pair_.student_symbols(), "student_ids", sample);
    work.teacher.load(teacher, teacher_padding_, pair_.teacher_symbols(), "teacher_ids", sample);
    const int32_t* symbols[] = {work.student.symbols.data(), work.teacher.symbols.data()};
    const int32_t sizes[] = {work.student.size(), work.teacher.size()};

    std::vector<Span>& chunks = part.spans;
    const size_t first = chunks.size();
    bool optimal = true;
    if (method == AlignMethod::dp) {
        optimal = align_dp(pair_, symbols[0], sizes[0], symbols[1], sizes[1], cell_budget, chunks).optimal;
    } else {
        work.gaps.clear();
        align_bytes(pair_, symbols[0], sizes[0], symbols[1], sizes[1], order_, chunks, work.gaps);
    }
    if (method == AlignMethod::automatic) {
        const auto merged = static_cast<std::ptrdiff_t>(chunks.size());
        for (const Span& gap : work.gaps) {
            if (gap.student_end > gap.student_start && gap.teacher_end > gap.teacher_start) {
                optimal &= bridge(gap, cell_budget, work, chunks);
            }
        }
        std::inplace_merge(chunks.begin() + static_cast<std::ptrdiff_t>(first), chunks.begin() + merged, chunks.end(),
                           [](const Span& x, const Span& y) { return x.student_start < y.student_start; });
    }

    size_t kept = first;
    for (size_t k = first; k < chunks.size(); ++k) {
        Span chunk = chunks[k];
        const bool predicted =
            work.student.follows_a_token(chunk.student_start) && work.teacher.follows_a_token(chunk.teacher_start);
        const bool whole = work.student.to_positions(chunk.student_start, chunk.student_end) &&
                           work.teacher.to_positions(chunk.teacher_start, chunk.teacher_end);
        if (!whole) continue;
        chunks[kept++] = chunk;
        part.predicted.push_back(predicted);
    }
    chunks.resize(kept);
    return optimal;
}

namespace {

// Concatenates the results of ranges, which arrive in any order. Each is copied by the thread that delivers it, unless
// an earlier one is still missing: then by the thread that delivers that one.
template <typename Part>
class InOrder {
  public:
    InOrder(int64_t ranges, BatchAlignment& result) : waiting_(static_cast<size_t>(ranges)), result_(result) {}

    // Takes the result of `range` and leaves another part, whose storage can be used again.
    void add(int64_t range, Part& part) {
        size_t first, last, place;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            Waiting& here = waiting_[static_cast<size_t>(range)];
            std::swap(here.part, part);
            here.is_done = true;
            first = last = next_;
            place = size_;
            for (; last < waiting_.size() && waiting_[last].is_done; ++last) size_ += waiting_[last].part.spans.size();
            next_ = last;
        }
        for (; first < last; ++first) {
            Part& source = waiting_[first].part;
            std::copy(source.spans.begin(), source.spans.end(), result_.spans.data.get() + place);
            std::copy(source.predicted.begin(), source.predicted.end(), result_.predicted.data.get() + place);
            place += source.spans.size();
            std::swap(part, source);
            source = {};
        }
    }
    size_t size() const { return size_; }

  private:
    struct Waiting {
        Part part;
        bool is_done = false;
    };
    std::mutex mutex_;
    std::vector<Waiting> waiting_;
    size_t next_ = 0;  // the first range that is missing
    size_t size_ = 0;  // chunks of all before it
    BatchAlignment& result_;
};

}  // namespace

BatchAlignment Aligner::align(const std::vector<TokenRow>& student, const std::vector<TokenRow>& teacher,
                              AlignMethod method, int64_t cell_budget, int threads) const {
    if (student.size() != teacher.size()) {
        value_error("teacher_ids: expected ", student.size(), " samples, as student_ids has, got ", teacher.size());
    }
    const size_t samples = student.size();
    std::vector<size_t> starts;  // of the ranges: consecutive samples with about as many tokens
    size_t most_chunks = 0;
    int64_t tokens = kTokensPerRange;
    for (size_t sample = 0; sample < samples; ++sample) {
        if (tokens >= kTokensPerRange) {
            starts.push_back(sample);
            tokens = 0;
        }
        tokens += student[sample].length + teacher[sample].length;
        most_chunks += static_cast<size_t>(std::min(student[sample].length, teacher[sample].length));
    }
    const auto ranges = static_cast<int64_t>(starts.size());
    starts.push_back(samples);

    BatchAlignment result;
    result.spans = Buffer<Span>(most_chunks);
    result.predicted = Buffer<uint8_t>(most_chunks);
    result.offsets.assign(samples + 1, 0);
    result.optimal.assign(samples, 1);
    struct Worker {
        Workspace work;
        Part part;
    };
    std::vector<Worker> workers(static_cast<size_t>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, ranges))));
    InOrder<Part> in_order(ranges, result);
    parallel_for(ranges, threads, [&](int worker, int64_t range) {
        auto& [work, part] = workers[static_cast<size_t>(worker)];
        part.spans.clear();
        part.predicted.clear();
        const size_t last = starts[static_cast<size_t>(range) + 1];
        for (size_t sample = starts[static_cast<size_t>(range)]; sample < last; ++sample) {
            const size_t before = part.spans.size();
            result.optimal[sample] = align_sample(student[sample], teacher[sample], static_cast<int64_t>(sample),
                                                  method, cell_budget, work, part);
            result.offsets[sample + 1] = static_cast<int64_t>(part.spans.size() - before);
        }
        in_order.add(range, part);
    });
    for (size_t sample = 0; sample < samples; ++sample) result.offsets[sample + 1] += result.offsets[sample];
    result.spans.cut(in_order.size());
    result.predicted.cut(in_order.size());
    return result;
}

}  // namespace xtoken
