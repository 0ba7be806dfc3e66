// Findings of one launch, each place once, as text.
#pragma once

#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace xtoken::emulator {

class Report {
  public:
    // A finding of this kind at this place in the code; further ones of the same kind and place are only counted.
    void add(const std::string& kind, const void* code, const void* other_code, const std::string& text);
    bool has(const std::string& kind, const void* code, const void* other_code) const;
    bool empty() const { return texts_.empty(); }
    std::string take(const std::string& title);

  private:
    std::set<std::tuple<std::string, const void*, const void*>> places_;
    std::vector<std::string> texts_;
};

// Function, file and line of code, through addr2line where it is installed. A return address: `code` - 1 is looked up.
std::string place_of(const void* code);
// The name of a function.
std::string name_of_function(const void* function);

}  // namespace xtoken::emulator
