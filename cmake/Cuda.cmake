# xtoken_cuda_module(name sources...): an extension module with CUDA kernels, for the architectures of XTOKEN_CUDA_ARCHS
# and, as PTX, for those that come after the last of them. setup.py decides whether there is one (XTOKEN_CUDA).
option(XTOKEN_CUDA "Build the CUDA kernels" OFF)
if(NOT XTOKEN_CUDA)
    return()
endif()

# Read by bench/cuda_resources.py too.
set(XTOKEN_CUDA_ARCHS "80;86;89;90;100;120" CACHE STRING "Compute capabilities to build for, without a point")
set(XTOKEN_CUDA_FLAGS -O3 -Xcompiler=-Wall,-Wextra)

# Found before the language is enabled, or CMake chooses an architecture of its own.
list(TRANSFORM XTOKEN_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
list(GET XTOKEN_CUDA_ARCHS -1 XTOKEN_PTX_ARCH)
list(APPEND CMAKE_CUDA_ARCHITECTURES "${XTOKEN_PTX_ARCH}-virtual")
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
    target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${XTOKEN_CUDA_FLAGS} --threads=2>)
    if(XTOKEN_WERROR)
        target_compile_options(${name} PRIVATE
            $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings> $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror>)
    endif()
endfunction()
