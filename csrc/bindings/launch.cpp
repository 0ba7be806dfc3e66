// Fields of launchers from Python's values.
#include "bindings/launch.h"

#include <string>
#include <utility>
#include <vector>

namespace xtoken {
namespace {

using Kind = Given::Kind;

std::vector<int64_t> sizes(PyObject* tuple) {
    std::vector<int64_t> result(PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0);
    for (size_t d = 0; d < result.size(); ++d) {
        result[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(d)));
    }
    return result;
}

std::string utf8(PyObject* text) {
    const char* characters = PyUnicode_AsUTF8(text);
    if (characters == nullptr) throw py::error_already_set();  // a lone surrogate
    return characters;
}

Given other(PyObject* value) {
    Given given;
    given.kind = Kind::other;
    given.text = std::string("a ") + Py_TYPE(value)->tp_name;
    return given;
}

Given array(PyObject* value) {
    if (PyTuple_GET_SIZE(value) < 4 || !PyUnicode_Check(PyTuple_GET_ITEM(value, 1))) return other(value);
    Given given;
    given.kind = Kind::array;
    given.at = PyLong_AsVoidPtr(PyTuple_GET_ITEM(value, 0));
    given.text = utf8(PyTuple_GET_ITEM(value, 1));
    given.shape = sizes(PyTuple_GET_ITEM(value, 2));
    given.strides = sizes(PyTuple_GET_ITEM(value, 3));
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return given.shape.size() == given.strides.size() ? given : other(value);
}

Given number(PyObject* value) {
    Given given;
    if (PyIndex_Check(value)) {
        const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value));
        if (!index) throw py::error_already_set();
        int overflow = 0;
        given.kind = Kind::integer;
        given.integer = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
        if (overflow != 0) {
            given.kind = Kind::other;
            given.text = "a number of more than 64 bits";
        }
    } else if (PyNumber_Check(value)) {
        given.kind = Kind::real;
        given.real = PyFloat_AsDouble(value);
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    } else {
        return other(value);
    }
    return given;
}

Given given_of(PyObject* value) {
    Given given;
    if (value == nullptr) return given;
    if (value == Py_None) {
        given.kind = Kind::none;
    } else if (PyBool_Check(value)) {
        given.kind = Kind::flag;
        given.integer = value == Py_True;
    } else if (PyUnicode_Check(value)) {
        given.kind = Kind::text;
        given.text = utf8(value);
    } else if (PyDict_Check(value) || PyList_Check(value)) {
        given.kind = Kind::fields;
    } else if (PyTuple_Check(value)) {
        return array(value);
    } else if (py::isinstance<Built>(value)) {
        const auto& built = py::cast<const Built&>(py::handle(value));
        given.kind = Kind::built;
        given.text = built.kind;
        given.at = built.made.get();
    } else {
        return number(value);
    }
    return given;
}

class Dict : public Reader {
  public:
    Dict(std::string path, PyObject* fields) : Reader(std::move(path)), fields_(fields) {}

  private:
    Given find(const char* name) const override { return given_of(PyDict_GetItemString(fields_, name)); }

    std::vector<std::string> names() const override {
        std::vector<std::string> result;
        for (const auto& item : py::reinterpret_borrow<py::dict>(fields_)) result.push_back(py::str(item.first));
        return result;
    }

    std::unique_ptr<Reader> enter(const char* name, int index, std::string path) const override {
        PyObject* value = PyDict_GetItemString(fields_, name);
        if (index >= 0) {
            const bool has = PyList_Check(value) && index < PyList_GET_SIZE(value);
            value = has ? PyList_GET_ITEM(value, index) : nullptr;
        }
        if (value == nullptr || !PyDict_Check(value)) return nullptr;
        return std::make_unique<Dict>(std::move(path), value);
    }

    PyObject* fields_;
};

}  // namespace

Params::Params(size_t size) : memory_(new std::max_align_t[size / sizeof(std::max_align_t) + 1]) {}

void Params::read(const char* name, void (*reader)(Reader&, void*), const py::dict& fields) {
    Dict given(name, fields.ptr());
    reader(given, memory_.get());
}

void bind_built(py::module_& m) {
    py::class_<Built>(m, "Built", py::module_local(), "What a builder has made, for fields of launchers.")
        .def_readonly("kind", &Built::kind)
        .def("__repr__", [](const Built& built) { return std::string("<") + built.kind + ">"; });
}

}  // namespace xtoken
