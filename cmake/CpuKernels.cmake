# xtoken_cpu_kernels(target files...): adds kernel files to a library, each compiled once per level of csrc/cpu/dispatch.h.
include(CheckCXXSourceCompiles)

function(xtoken_cpu_kernels target)
    set(levels portable)
    # As the preprocessor condition in dispatch.h.
    check_cxx_source_compiles("
        #if !(defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)))
        #error other
        #endif
        int main() {}" XTOKEN_CPU_X86)
    if(XTOKEN_CPU_X86)
        list(APPEND levels avx2 avx512)
    endif()
    set(avx2_flags -mavx2 -mfma -mf16c)
    set(avx512_flags ${avx2_flags} -mavx512f -mavx512dq -mavx512bw -mavx512vl)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        # GCC's own AVX-512 headers read an undefined register on purpose (GCC bug 105593).
        list(APPEND avx512_flags -Wno-uninitialized -Wno-maybe-uninitialized)
    endif()
    foreach(level IN LISTS levels)
        string(TOUPPER ${level} name)
        add_library(${target}_${level} OBJECT ${ARGN})
        target_include_directories(${target}_${level} PRIVATE csrc)
        target_compile_definitions(${target}_${level} PRIVATE XTOKEN_LEVEL=${level} XTOKEN_LEVEL_${name}=1)
        # A product and a sum are fused where the source says so, and nowhere else.
        xtoken_warnings(${target}_${level})
        target_compile_options(${target}_${level} PRIVATE ${${level}_flags} $<$<NOT:$<CXX_COMPILER_ID:MSVC>>:-ffp-contract=off>)
        target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${level}>)
    endforeach()
endfunction()
