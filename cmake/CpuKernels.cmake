# xtoken_cpu_kernels(files...): adds kernel files to _core, each compiled once per level of csrc/cpu/dispatch.h.
include(CheckCXXSourceCompiles)

set(XTOKEN_CPU_LEVELS portable)
# As the preprocessor condition in dispatch.h.
check_cxx_source_compiles("
    #if !(defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)))
    #error other
    #endif
    int main() {}" XTOKEN_CPU_X86)
if(XTOKEN_CPU_X86)
    list(APPEND XTOKEN_CPU_LEVELS avx2 avx512)
endif()
set(XTOKEN_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(XTOKEN_AVX512_FLAGS ${XTOKEN_AVX2_FLAGS} -mavx512f -mavx512dq -mavx512bw -mavx512vl)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 headers read an undefined register on purpose (GCC bug 105593).
    list(APPEND XTOKEN_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
# The compiler's own vectors are no part of an interface.
set(XTOKEN_PORTABLE_FLAGS $<$<NOT:$<CXX_COMPILER_ID:MSVC>>:-Wno-psabi>)
foreach(level IN LISTS XTOKEN_CPU_LEVELS)
    string(TOUPPER ${level} name)
    add_library(xtoken_cpu_${level} OBJECT)
    target_include_directories(xtoken_cpu_${level} PRIVATE csrc)
    target_compile_definitions(xtoken_cpu_${level} PRIVATE XTOKEN_LEVEL=${level} XTOKEN_LEVEL_${name}=1)
    xtoken_warnings(xtoken_cpu_${level})
    # A product and a sum are fused where the source says so, and nowhere else.
    target_compile_options(xtoken_cpu_${level} PRIVATE
        ${XTOKEN_${name}_FLAGS} $<$<NOT:$<CXX_COMPILER_ID:MSVC>>:-ffp-contract=off>)
    target_sources(_core PRIVATE $<TARGET_OBJECTS:xtoken_cpu_${level}>)
endforeach()

function(xtoken_cpu_kernels)
    foreach(level IN LISTS XTOKEN_CPU_LEVELS)
        target_sources(xtoken_cpu_${level} PRIVATE ${ARGN})
    endforeach()
endfunction()
