// Text of findings; names of places in the code.
#include "report.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>

namespace xtoken::emulator {
namespace {

struct Line {
    std::string function, place;
};

Line look_up(const void* code) {
    Dl_info module{};
    if (dladdr(code, &module) == 0) return {"?", "?"};
    std::ostringstream command;
    command << "addr2line -C -f -i -s -e '" << module.dli_fname << "' 0x" << std::hex
            << reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(module.dli_fbase) << " 2>/dev/null";
    Line line{"?", "?"};
    if (FILE* pipe = popen(command.str().c_str(), "r")) {
        char text[4096];
        const auto next = [&](std::string& part) {
            if (fgets(text, sizeof(text), pipe) == nullptr) return false;
            part = std::string(text).substr(0, std::string(text).find_first_of("\n"));
            return true;
        };
        // of the functions that are inlined there, the first that is not the emulator's
        while (next(line.function) && next(line.place)) {
            if (line.place.rfind("emulator.h:", 0) != 0 && line.place.rfind("intrinsics.h:", 0) != 0) break;
        }
        pclose(pipe);
    }
    line.place = line.place.substr(0, line.place.find(" ("));  // "(discriminator 3)"
    return line;
}

}  // namespace

void Report::add(const std::string& kind, const void* code, const void* other_code, const std::string& text) {
    if (places_.insert({kind, code, other_code}).second) texts_.push_back(kind + ": " + text);
}

bool Report::has(const std::string& kind, const void* code, const void* other_code) const {
    return places_.count({kind, code, other_code}) != 0;
}

std::string Report::take(const std::string& title) {
    std::ostringstream all;
    all << title;
    for (const std::string& text : texts_) all << "\n  " << text;
    texts_.clear();
    places_.clear();
    return all.str();
}

std::string place_of(const void* code) { return look_up(static_cast<const char*>(code) - 1).place; }

std::string name_of_function(const void* function) {
    std::string name = look_up(function).function;
    const std::string unnamed = "(anonymous namespace)::";
    for (size_t at; (at = name.find(unnamed)) != std::string::npos;) name.erase(at, unnamed.size());
    // Without the parameters, which are the last pair of parentheses.
    int depth = 0;
    for (size_t i = name.size(); i > 0; --i) {
        depth += name[i - 1] == ')' ? 1 : name[i - 1] == '(' ? -1 : 0;
        if (depth == 0) return name[i - 1] == '(' ? name.substr(0, i - 1) : name;
    }
    return name;
}

}  // namespace xtoken::emulator
