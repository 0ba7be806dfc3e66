// Bindings of core/vocabulary.h.
#include "core/vocabulary.h"

#include <pybind11/stl.h>

#include "bindings/arrays.h"

namespace xtoken {
namespace {

std::vector<TokenKind> to_kinds(const Array<uint8_t>& kinds) {
    std::vector<TokenKind> result;
    for (const uint8_t kind : to_vector(kinds, "kinds")) {
        if (kind > static_cast<uint8_t>(TokenKind::unused)) value_error("kinds: ", int{kind}, " is no token kind");
        result.push_back(static_cast<TokenKind>(kind));
    }
    return result;
}

int32_t checked(const Vocabulary& vocabulary, int64_t id) {
    if (id < 0 || id >= vocabulary.size()) {
        value_error("token id ", id, " is outside the vocabulary of ", vocabulary.size(), " tokens");
    }
    return static_cast<int32_t>(id);
}

}  // namespace

void bind_vocabulary(py::module_& m) {
    m.attr("token_kinds") = py::make_tuple("normal", "byte", "special", "unused");

    m.def("byte_level_piece", [](const py::bytes& bytes) { return byte_level_piece(std::string(bytes)); });
    m.def("byte_level_bytes", [](const std::vector<std::string>& pieces) {
        py::list result;
        for (const std::string& piece : pieces) result.append(py::bytes(byte_level_bytes(piece)));
        return result;
    });

    py::class_<Vocabulary>(m, "Vocabulary")
        .def(py::init([](const std::vector<std::string>& tokens, const Array<uint8_t>& kinds, Vocabulary::Roles roles) {
                 return Vocabulary(tokens, to_kinds(kinds), std::move(roles));
             }),
             py::arg("tokens"), py::arg("kinds"), py::arg("roles"))
        .def("__len__", &Vocabulary::size)
        .def("join", [](const Vocabulary& v, const Array<int64_t>& ids) {
            std::string text;
            for (const int64_t id : to_vector(ids, "ids")) {
                if (v.is_text(checked(v, id))) text += v.bytes(static_cast<int32_t>(id));
            }
            return py::bytes(text);
        });
}

}  // namespace xtoken
