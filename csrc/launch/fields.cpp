// Parameter structs filled by name: every check of a field, and its messages.
#include "launch/fields.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "launch/arguments.h"

namespace xtoken {
namespace {

std::string listed(const char* const* names, size_t count, const char* last) {
    std::string text;
    for (size_t i = 0; i < count; ++i) {
        text += i == 0 ? "'" : i + 1 == count ? std::string("' ") + last + " '" : "', '";
        text += names[i];
    }
    return text + "'";
}

// Whether the array is contiguous.
bool contiguous(const Given& given) {
    int64_t expected = 1;
    for (size_t d = given.shape.size(); d-- > 0;) {
        if (given.shape[d] == 0) return true;
        if (given.shape[d] != 1 && given.strides[d] != expected) return false;
        expected *= given.shape[d];
    }
    return true;
}

bool may_be_null(const Field& field) { return std::strstr(field.what, "null:") != nullptr; }

std::string described(const Given& given) {
    switch (given.kind) {
        case Given::Kind::none:
            return "None";
        case Given::Kind::flag:
            return given.integer != 0 ? "True" : "False";
        case Given::Kind::integer:
            return std::to_string(given.integer);
        case Given::Kind::real:
            return "a float";
        case Given::Kind::text:
            return "'" + given.text + "'";
        case Given::Kind::array: {
            std::string text = given.text + " [";
            for (size_t d = 0; d < given.shape.size(); ++d) {
                text += (d == 0 ? "" : ", ") + std::to_string(given.shape[d]);
            }
            return text + (contiguous(given) ? "]" : "] with gaps");
        }
        case Given::Kind::built:
            return "a " + given.text;
        case Given::Kind::fields:
            return "fields";
        default:
            return given.text;
    }
}

}  // namespace

void unknown(const char* what, const std::string& name, const std::vector<const char*>& known) {
    std::vector<const char*> sorted = known;
    std::sort(sorted.begin(), sorted.end(), [](const char* a, const char* b) { return std::strcmp(a, b) < 0; });
    value_error(what, ": expected ", listed(sorted.data(), sorted.size(), "or"), ", got '", name, "'");
}

std::string Reader::describe(const Field& field) const { return path_ + "." + field.name; }

void Reader::wrong_type(const Field& field, const std::string& expected, const Given& given) const {
    type_error(describe(field), ": expected ", expected, " (", field.what, "), got ", described(given));
}

Given Reader::take(const Field& field) {
    seen_.push_back(field.name);
    Given given = find(field.name);
    if (given.kind == Given::Kind::missing) value_error(describe(field), ": missing (", field.what, ")");
    return given;
}

void Reader::finish() const {
    const std::vector<std::string> given = names();
    if (given.size() == seen_.size()) return;
    for (const std::string& name : given) {
        if (std::find(seen_.begin(), seen_.end(), name) == seen_.end()) {
            value_error(path_, ".", name, ": expected ", listed(seen_.data(), seen_.size(), "or"));
        }
    }
}

Reader& Reader::nested(const Field& field, int index) {
    if (index <= 0) {
        const Given given = take(field);
        if (given.kind != Given::Kind::fields) {
            wrong_type(field, index < 0 ? "fields by name" : "a list of fields by name", given);
        }
    }
    const std::string path = describe(field) + (index < 0 ? "" : "[" + std::to_string(index) + "]");
    nested_.push_back(enter(field.name, index, path));
    if (nested_.back() == nullptr) type_error(path, ": expected fields by name (", field.what, ")");
    return *nested_.back();
}

void Reader::read(const Field& field, bool& value) {
    const Given given = take(field);
    if (given.kind != Given::Kind::flag) wrong_type(field, "True or False", given);
    value = given.integer != 0;
}

template <typename T>
void Reader::read_integer(const Field& field, T& value) {
    const Given given = take(field);
    if (given.kind != Given::Kind::integer) wrong_type(field, "a whole number", given);
    using Limits = std::numeric_limits<T>;
    if (given.integer < Limits::min() || given.integer > Limits::max()) {
        value_error(describe(field), ": expected ", Limits::min(), " ... ", Limits::max(), " (", field.what, "), got ",
                    given.integer);
    }
    value = static_cast<T>(given.integer);
}

void Reader::read(const Field& field, int32_t& value) { read_integer(field, value); }
void Reader::read(const Field& field, int64_t& value) { read_integer(field, value); }

void Reader::read(const Field& field, double& value) {
    const Given given = take(field);
    if (given.kind == Given::Kind::integer) {
        value = static_cast<double>(given.integer);
    } else if (given.kind == Given::Kind::real) {
        value = given.real;
    } else {
        wrong_type(field, "a number", given);
    }
}

void Reader::read(const Field& field, float& value) {
    double exact = 0;
    read(field, exact);
    value = static_cast<float>(exact);
    if (std::isinf(value) && !std::isinf(exact)) {
        value_error(describe(field), ": expected a float32 (", field.what, "), got ", exact);
    }
}

void Reader::read(const Field& field, Logits& value) {
    const Given given = take(field);
    value = {nullptr, Element::float32, 0, 1, 0, 0, 0};
    if (given.kind == Given::Kind::none && may_be_null(field)) return;
    const Choices types = choices_of(Element{});
    const char* const* end = types.names + types.count;
    const char* const* type = std::find(types.names, end, given.text);
    const bool fits = given.kind == Given::Kind::array && type != end && given.shape.size() == 3 &&
                      (given.strides[2] == 1 || given.shape[2] == 1);
    if (!fits) {
        wrong_type(field, "three dimensions of " + listed(types.names, 3, "or") + ", rows without gaps", given);
    }
    if (given.shape[2] > std::numeric_limits<int32_t>::max()) {
        value_error(describe(field), ": expected at most 2^31 - 1 columns, got ", given.shape[2]);
    }
    value = {const_cast<void*>(given.at),
             static_cast<Element>(type - types.names),
             given.shape[0],
             std::max<int64_t>(given.shape[1], 1),
             static_cast<int32_t>(given.shape[2]),
             given.strides[0],
             given.strides[1]};
}

void Reader::read_array(const Field& field, const char* element, void* out, int64_t* size) {
    const Given given = take(field);
    const bool nothing = given.kind == Given::Kind::none && may_be_null(field);
    const bool fits = given.kind == Given::Kind::array && (*element == '\0' || given.text == element) &&
                      contiguous(given) && (size == nullptr || given.shape.size() == 1);
    if (!nothing && !fits) {
        const std::string dimensions = size == nullptr ? "" : "one dimension of ";
        wrong_type(field, dimensions + (*element == '\0' ? "numbers" : element) + " without gaps", given);
    }
    std::memcpy(out, &given.at, sizeof(given.at));
    if (size != nullptr) *size = given.shape.empty() ? 0 : given.shape[0];
}

void Reader::read_built(const Field& field, const char* kind, void* out) {
    const Given given = take(field);
    const bool nothing = given.kind == Given::Kind::none && may_be_null(field);
    const bool fits = given.kind == Given::Kind::built && given.text == kind;
    if (!nothing && !fits) wrong_type(field, std::string("a ") + kind, given);
    std::memcpy(out, &given.at, sizeof(given.at));
}

void Reader::read_choice(const Field& field, const Choices& choices, int& chosen) {
    const Given given = take(field);
    if (given.kind != Given::Kind::text) wrong_type(field, "a name", given);
    const auto count = static_cast<size_t>(choices.count);
    const char* const* found = std::find(choices.names, choices.names + count, given.text);
    if (found == choices.names + count) {
        value_error(describe(field), ": expected ", listed(choices.names, count, "or"), ", got '", given.text, "'");
    }
    chosen = static_cast<int>(found - choices.names);
}

}  // namespace xtoken
