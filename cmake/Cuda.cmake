# xtoken_cuda_module(name sources...): an extension module with CUDA kernels, for the architectures of XTOKEN_CUDA_ARCHS
# and, as PTX of the lowest of them, for all others above it. setup.py decides whether there is one (XTOKEN_CUDA).
option(XTOKEN_CUDA "Build the CUDA kernels" OFF)
if(NOT XTOKEN_CUDA)
    return()
endif()

# Read by bench/cuda_resources.py too. Code for 8.0 runs on 8.6 and 8.9 as it is, code for 10.0 on 10.3, for 12.0 on 12.1.
set(XTOKEN_CUDA_ARCHS "80;90;100;120" CACHE STRING "Compute capabilities to build for, without a point")
set(XTOKEN_CUDA_FLAGS -O3 -Xcompiler=-Wall,-Wextra)

# One pass of the compiler to the PTX of the lowest architecture, which is enough for kernels that use nothing newer, and
# the assembler for each: half of the build would be passes for the others. CMake has no word for that.
list(SORT XTOKEN_CUDA_ARCHS COMPARE NATURAL)
list(GET XTOKEN_CUDA_ARCHS 0 XTOKEN_PTX_ARCH)
if(XTOKEN_PTX_ARCH LESS 80)
    message(FATAL_ERROR "XTOKEN_CUDA_ARCHS: expected 80 or more, got ${XTOKEN_PTX_ARCH}: kernels copy asynchronously")
endif()
list(TRANSFORM XTOKEN_CUDA_ARCHS PREPEND "sm_" OUTPUT_VARIABLE XTOKEN_CUDA_CODE)
string(JOIN "," XTOKEN_CUDA_CODE ${XTOKEN_CUDA_CODE} "compute_${XTOKEN_PTX_ARCH}")
list(APPEND XTOKEN_CUDA_FLAGS --threads=2 -gencode=arch=compute_${XTOKEN_PTX_ARCH},code=[${XTOKEN_CUDA_CODE}])
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
find_package(CUDAToolkit 12.0 REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

function(xtoken_cuda_module name)
    pybind11_add_module(${name} MODULE ${ARGN})
    # The runtime is linked in: the module loads where neither a toolkit nor a driver is. Its symbols stay inside.
    set_target_properties(${name} PROPERTIES CUDA_RUNTIME_LIBRARY Static LIBRARY_OUTPUT_DIRECTORY ${XTOKEN_OUTPUT_DIR})
    target_include_directories(${name} PRIVATE csrc)
    target_link_libraries(${name} PRIVATE CUDA::cudart_static)
    target_link_options(${name} PRIVATE $<$<NOT:$<PLATFORM_ID:Windows,Darwin>>:LINKER:--exclude-libs,ALL>)
    string(JOIN "," architectures ${XTOKEN_CUDA_ARCHS})
    target_compile_definitions(${name} PRIVATE XTOKEN_CUDA_ARCHITECTURES="${architectures}")
    target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${XTOKEN_CUDA_FLAGS}>")
    if(XTOKEN_WERROR)
        target_compile_options(${name} PRIVATE
            $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings> $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror>)
    endif()
endfunction()
