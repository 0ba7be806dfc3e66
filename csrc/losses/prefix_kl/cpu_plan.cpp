// The layout of a piece index for the CPU kernel of prefix KL.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "core/sliced.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "losses/prefix_kl/params.h"

namespace xtoken::cpu {
namespace {

struct PlanParams {
#define XTOKEN_CPU_PREFIX_PLAN(FIELD)                                      \
    FIELD(Values<int32_t>, data, "a piece index, see core/piece_index.h"); \
    FIELD(Values<uint8_t>, merged, "[events] whether calibration has merged it from several")
    XTOKEN_FIELDS(XTOKEN_CPU_PREFIX_PLAN)
};

std::vector<int32_t> tokens_of_events(const PieceSide& side, int32_t events) {
    std::vector<int32_t> count(static_cast<size_t>(events), 0);
    for (int32_t id = 0; id < side.size; ++id) ++count[side.event[id]];
    return count;
}

void set_bit(std::vector<uint16_t>& bits, int32_t id) { bits[id / lanes] |= static_cast<uint16_t>(1u << id % lanes); }

// How an event is laid out.
enum class Kind : char { pair, list, absent };

// One vocabulary at the start of a chunk; owns what its view shows.
struct Start {
    std::vector<int64_t> start;
    std::vector<int32_t> tokens, lanes_with, absent, number;  // `number` by event: that of its list
    std::vector<int32_t> of_event, ptr, all, known_ptr{0}, known;
    std::vector<uint16_t> absent_bits, paired_bits;
    StartView view{};

    void lay_out(const PieceSide& side, const std::vector<Kind>& kinds) {
        absent_bits.assign(padded(side.size) / lanes, 0);
        paired_bits = absent_bits;
        std::vector<std::vector<int32_t>> lists(kinds.size());
        std::vector<int32_t> order;  // events in the order of their first tokens, so that neighbours are read together
        for (int32_t id = 0; id < side.size; ++id) {
            const int32_t event = side.event[id];
            if (kinds[event] == Kind::pair) {
                set_bit(paired_bits, id);
            } else if (kinds[event] == Kind::absent) {
                set_bit(absent_bits, id);
                absent.push_back(id);
            } else {
                if (lists[event].empty()) order.push_back(event);
                lists[event].push_back(id);
            }
        }
        const auto absent_count = static_cast<int64_t>(absent.size());
        absent.resize(padded(absent_count), 0);

        std::vector<int32_t> counts;
        for (const int32_t event : order) counts.push_back(static_cast<int32_t>(lists[event].size()));
        SlicedLists sliced(counts, lanes);
        tokens.assign(sliced.size(), 0);
        lanes_with.assign(sliced.start.back(), 0);
        number.assign(kinds.size(), 0);
        for (size_t n = 0; n < order.size(); ++n) {
            const std::vector<int32_t>& list = lists[order[n]];
            number[order[n]] = sliced.place[n];
            sliced.each_entry(static_cast<int64_t>(n), counts[n], [&](int64_t at, int64_t i) {
                tokens[at] = list[i];
                ++lanes_with[at / lanes];
            });
        }
        start = std::move(sliced.start);
        ptr = tokens_of_events(side, static_cast<int32_t>(kinds.size()));
        ptr.insert(ptr.begin(), 0);
        std::partial_sum(ptr.begin(), ptr.end(), ptr.begin());
        all.resize(side.size + lanes, 0);
        std::vector<int32_t> next(ptr.begin(), ptr.end() - 1);
        for (int32_t id = 0; id < side.size; ++id) all[next[side.event[id]]++] = id;
        of_event.assign(kinds.size(), absent_event);
        int64_t most_known = 0;
        for (int32_t id = 0; id < side.size; ++id) {
            const int32_t event = side.event[id];
            if (kinds[event] != Kind::absent) of_event[event] = kinds[event] == Kind::pair ? id : -1 - number[event];
            const auto first = static_cast<int64_t>(known.size());
            for (int32_t n = side.joined_ptr[id]; n < side.joined_ptr[id + 1]; ++n) {
                known.push_back(side.event[side.joined[n]]);
            }
            std::sort(known.begin() + first, known.end());
            known.erase(std::unique(known.begin() + first, known.end()), known.end());
            known_ptr.push_back(static_cast<int32_t>(known.size()));
            most_known = std::max(most_known, static_cast<int64_t>(known.size()) - first);
        }
        const TokensView view_of_lists{static_cast<int64_t>(start.size()) - 1, start.data(), tokens.data(),
                                       lanes_with.data()};
        view = {view_of_lists, absent.data(), absent_bits.data(), absent_count, paired_bits.data(), of_event.data(),
                ptr.data(),    all.data(),    known_ptr.data(),   known.data(), most_known};
    }
};

// Owns a piece index and the layout of its events.
class PrefixPlan : public PrefixPlanView {
  public:
    // Throws Error if the data is not a piece index.
    explicit PrefixPlan(const PlanParams& params)
        : PrefixPlanView{},
          data_(params.data.data, params.data.data + params.data.size),
          merged_(params.merged.data, params.merged.data + params.merged.size) {
        index = PieceIndex::view(data_.data(), data_.size(), true);
        if (merged_.size() != static_cast<size_t>(index.events)) {
            value_error("merged: expected ", index.events, " events, got ", merged_.size());
        }
        merged = merged_.data();
        const PieceSide &students = index.side[0], &teachers = index.side[1];
        const std::vector<Kind> kinds = kinds_of_events();
        events = std::count(kinds.begin(), kinds.end(), Kind::list);
        student_.lay_out(students, kinds);
        teacher_.lay_out(teachers, kinds);
        teacher_list_.assign(padded(events), 0);
        std::vector<int32_t> teacher_token(kinds.size(), 0);
        for (size_t e = 0; e < kinds.size(); ++e) {
            if (kinds[e] == Kind::list) teacher_list_[student_.number[e]] = teacher_.number[e];
        }
        for (int32_t id = 0; id < teachers.size; ++id) teacher_token[teachers.event[id]] = id;
        partner_.assign(padded(students.size), static_cast<int32_t>(padded(teachers.size)));
        for (int32_t id = 0; id < students.size; ++id) {
            const int32_t event = students.event[id];
            if (kinds[event] == Kind::pair) {
                partner_[id] = teacher_token[event];
            } else {
                other_list_.push_back(kinds[event] == Kind::list ? student_.number[event]
                                                                 : static_cast<int32_t>(padded(events)));
            }
        }
        others = static_cast<int64_t>(other_list_.size());
        other_list_.resize(padded(others), 0);
        partner_run_ = find_runs(partner_, student_.paired_bits);
        partner = partner_.data();
        partner_run = partner_run_.data();
        student = student_.view;
        teacher = teacher_.view;
        teacher_list = teacher_list_.data();
        other_list = other_list_.data();
    }
    PrefixPlan(const PrefixPlan&) = delete;
    PrefixPlan& operator=(const PrefixPlan&) = delete;

  private:
    std::vector<Kind> kinds_of_events() const {
        const std::vector<int32_t> students = tokens_of_events(index.side[0], index.events);
        const std::vector<int32_t> teachers = tokens_of_events(index.side[1], index.events);
        std::vector<Kind> kinds(students.size(), Kind::absent);
        for (size_t e = 0; e < kinds.size(); ++e) {
            if (students[e] == 0 || teachers[e] == 0) continue;
            kinds[e] = students[e] == 1 && teachers[e] == 1 ? Kind::pair : Kind::list;
        }
        return kinds;
    }

    std::vector<int32_t> data_;
    std::vector<uint8_t> merged_;
    std::vector<int32_t> partner_, partner_run_, teacher_list_, other_list_;
    Start student_, teacher_;
};

std::shared_ptr<const PrefixPlanView> build_plan(const PlanParams& params) {
    return std::make_shared<const PrefixPlan>(params);
}

const Builder builder("prefix_plan", &build_plan);

}  // namespace
}  // namespace xtoken::cpu
