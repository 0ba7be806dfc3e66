# xtoken_loss(name): the kernels of csrc/losses/<name>: cpu.cpp, cpu_kernel.cpp (compiled once per instruction set) and
# cuda.cu; cpu_plan.cpp where there is one.
function(xtoken_loss name)
    set(folder csrc/losses/${name})
    target_sources(xtoken_cpu PRIVATE ${folder}/cpu.cpp)
    if(EXISTS ${CMAKE_SOURCE_DIR}/${folder}/cpu_plan.cpp)
        target_sources(xtoken_cpu PRIVATE ${folder}/cpu_plan.cpp)
    endif()
    xtoken_cpu_kernels(${folder}/cpu_kernel.cpp)
    if(XTOKEN_CUDA)
        target_sources(_cuda PRIVATE ${folder}/cuda.cu)
    endif()
endfunction()
