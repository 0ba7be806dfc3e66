// The one error type of the core; the bindings translate it to ValueError, TypeError or RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace xtoken {

class Error : public std::runtime_error {
  public:
    enum class Kind { value, type, runtime };

    Error(Kind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
    Kind kind() const { return kind_; }

  private:
    Kind kind_;
};

// A bad value given by the caller, or one of a wrong type. The parts are streamed together: name the argument, what was
// expected, what came.
template <typename... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(Error::Kind::value, message.str());
}

template <typename... Parts>
[[noreturn]] void type_error(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(Error::Kind::type, message.str());
}

}  // namespace xtoken
