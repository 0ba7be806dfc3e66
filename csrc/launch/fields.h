// Parameter structs that list their fields once, and launchers that are known by name.
//
//     #define XTOKEN_EXAMPLE(FIELD) (a line for each field, ending with a semicolon but for the last)
//         FIELD(const float*, scale, "[chunks] null: ones"); FIELD(int64_t, chunks, "how many")
//
//     struct Example { XTOKEN_FIELDS(XTOKEN_EXAMPLE) };
//
//     void example(const Example& params, const Launch& launch) { ... }
//
//     const Launcher launcher("example", &example);
//
// declares the fields, and lets a caller of any language launch it with values by name (bindings/launch.cpp). A field
// is a number, a flag, an enum with `choices_of`, a pointer to numbers (void*: of any type), Logits, Values, a struct
// with fields, an array of these, or a pointer to something that a Builder has made. It may be null if its description
// says "null:".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define XTOKEN_DECLARE_FIELD(type, name, what) type name
#define XTOKEN_READ_FIELD(type, name, what) reader.read({#name, what}, self.name)
#define XTOKEN_FIELDS(LIST)                        \
    LIST(XTOKEN_DECLARE_FIELD);                    \
    template <typename Self>                       \
    static void read(Reader& reader, Self& self) { \
        LIST(XTOKEN_READ_FIELD);                   \
    }

namespace xtoken {

struct Logits;
template <typename T>
struct Values;

struct Field {
    const char *name, *what;
};

// The names of an enum's values, in order.
struct Choices {
    const char* const* names;
    int count;
};

// A value as the caller has it.
struct Given {
    enum class Kind { missing, none, flag, integer, real, text, array, built, fields, other };
    Kind kind = Kind::missing;
    int64_t integer = 0;  // a flag, too
    double real = 0;
    std::string text;          // or the type of an array's elements, the kind of what was built, the type of others
    const void* at = nullptr;  // an array, or what was built
    std::vector<int64_t> shape, strides;
};

// Something that was made for launchers, a plan say; `kind` is that of its type.
struct Built {
    const char* kind;
    std::shared_ptr<const void> made;
};

template <typename T>
constexpr const char* element_name() {
    using E = std::remove_cv_t<T>;
    return std::is_void_v<E>            ? ""
           : std::is_same_v<E, float>   ? "float32"
           : std::is_same_v<E, double>  ? "float64"
           : std::is_same_v<E, int64_t> ? "int64"
           : std::is_same_v<E, int32_t> ? "int32"
           : std::is_same_v<E, uint8_t> ? "uint8"
                                        : nullptr;
}

template <typename T, typename = void>
struct HasKind : std::false_type {};
template <typename T>
struct HasKind<T, std::void_t<decltype(T::kind)>> : std::true_type {};

// The fields of one struct as a caller gives them. Functions throw Error with the field's path and what it is.
class Reader {
  public:
    explicit Reader(std::string path) : path_(std::move(path)) {}
    virtual ~Reader() = default;
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    void read(const Field& field, bool& value);
    void read(const Field& field, int32_t& value);
    void read(const Field& field, int64_t& value);
    void read(const Field& field, float& value);
    void read(const Field& field, double& value);
    void read(const Field& field, Logits& value);
    template <typename T>
    void read(const Field& field, Values<T>& value) {
        read_array(field, element_name<T>(), &value.data, &value.size);
    }
    template <typename T>
    void read(const Field& field, T*& value) {
        if constexpr (HasKind<T>::value) {
            read_built(field, T::kind, &value);
        } else {
            static_assert(element_name<T>() != nullptr, "a type of numbers");
            read_array(field, element_name<T>(), &value, nullptr);
        }
    }
    template <typename T, size_t N>
    void read(const Field& field, T (&values)[N]) {
        for (size_t i = 0; i < N; ++i) read_struct(nested(field, static_cast<int>(i)), values[i]);
    }
    template <typename T>
    void read(const Field& field, T& value) {
        if constexpr (std::is_enum_v<T>) {
            int chosen = 0;
            read_choice(field, choices_of(T{}), chosen);
            value = static_cast<T>(chosen);
        } else {
            read_struct(nested(field, -1), value);
        }
    }

    // Throws if the caller gave a field that was not read.
    void finish() const;

  protected:
    virtual Given find(const char* name) const = 0;
    virtual std::vector<std::string> names() const = 0;
    // The fields of a struct, or (index >= 0) of one in a sequence; null if there are none.
    virtual std::unique_ptr<Reader> enter(const char* name, int index, std::string path) const = 0;

  private:
    template <typename T>
    static void read_struct(Reader& reader, T& value) {
        T::read(reader, value);
        reader.finish();
    }
    Reader& nested(const Field& field, int index);
    Given take(const Field& field);
    // Pointers are stored in the object at `out`.
    void read_array(const Field& field, const char* element, void* out, int64_t* size);
    void read_built(const Field& field, const char* kind, void* out);
    void read_choice(const Field& field, const Choices& choices, int& chosen);
    template <typename T>
    void read_integer(const Field& field, T& value);
    [[noreturn]] void wrong_type(const Field& field, const std::string& expected, const Given& given) const;
    std::string describe(const Field& field) const;

    std::string path_;
    std::vector<const char*> seen_;
    std::vector<std::unique_ptr<Reader>> nested_;
};

// Throws Error: no launcher, builder of that name.
[[noreturn]] void unknown(const char* what, const std::string& name, const std::vector<const char*>& known);

// Members of one type, by name; they add themselves before main.
template <typename Member>
struct Registry {
    static const Member& named(const std::string& name) {
        std::vector<const char*> known;
        for (const Member* one = first; one != nullptr; one = one->next) {
            if (name == one->name) return *one;
            known.push_back(one->name);
        }
        unknown(Member::what, name, known);
    }
    static inline const Member* first = nullptr;
};

// Reads parameters into memory of `size` bytes.
template <typename Params>
void read_params(Reader& reader, void* memory) {
    static_assert(std::is_trivially_copyable_v<Params> && alignof(Params) <= alignof(std::max_align_t));
    Params* params = new (memory) Params{};
    Params::read(reader, *params);
    reader.finish();
}

// A function on parameters, by name. `Launch` says how it is to run.
template <typename Launch>
class Launcher {
  public:
    static constexpr const char* what = "launcher";

    // `asked`: the floats of workspace that a block needs.
    template <typename Params>
    Launcher(const char* given_name, void (*called)(const Params&, const Launch&),
             int64_t (*asked)(const Params&) = nullptr)
        : name(given_name),
          size(sizeof(Params)),
          next(Registry<Launcher>::first),
          read(&read_params<Params>),
          run_(reinterpret_cast<Function>(called)),
          workspace_(reinterpret_cast<Function>(asked)),
          call_([](Function function, const void* params, const Launch& launch) {
              reinterpret_cast<void (*)(const Params&, const Launch&)>(function)(*static_cast<const Params*>(params),
                                                                                 launch);
          }),
          ask_([](Function function, const void* params) {
              return reinterpret_cast<int64_t (*)(const Params&)>(function)(*static_cast<const Params*>(params));
          }) {
        Registry<Launcher>::first = this;
    }

    void run(const void* params, const Launch& launch) const { call_(run_, params, launch); }
    int64_t workspace(const void* params) const { return workspace_ == nullptr ? 0 : ask_(workspace_, params); }

    const char* const name;
    const size_t size;  // of the parameters
    const Launcher* const next;
    void (*const read)(Reader&, void*);

  private:
    using Function = void (*)();
    Function run_, workspace_;
    void (*call_)(Function, const void*, const Launch&);
    int64_t (*ask_)(Function, const void*);
};

// Makes something that launchers take, by name.
class Builder {
  public:
    static constexpr const char* what = "builder";

    template <typename Params, typename Made>
    Builder(const char* given_name, std::shared_ptr<const Made> (*called)(const Params&))
        : name(given_name),
          size(sizeof(Params)),
          next(Registry<Builder>::first),
          read(&read_params<Params>),
          build_(reinterpret_cast<Function>(called)),
          call_([](Function function, const void* params) {
              using Typed = std::shared_ptr<const Made> (*)(const Params&);
              return Built{Made::kind, reinterpret_cast<Typed>(function)(*static_cast<const Params*>(params))};
          }) {
        Registry<Builder>::first = this;
    }

    Built build(const void* params) const { return call_(build_, params); }

    const char* const name;
    const size_t size;
    const Builder* const next;
    void (*const read)(Reader&, void*);

  private:
    using Function = void (*)();
    Function build_;
    Built (*call_)(Function, const void*);
};

}  // namespace xtoken
