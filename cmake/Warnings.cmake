# xtoken_warnings(target): the warnings that the whole project is held to; errors with -DXTOKEN_WERROR=1 (CI).
option(XTOKEN_WERROR "Treat compiler warnings as errors" OFF)

function(xtoken_warnings target)
    if(MSVC)
        target_compile_options(${target} PRIVATE /W4 $<$<BOOL:${XTOKEN_WERROR}>:/WX>)
    else()
        target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
            $<$<BOOL:${XTOKEN_WERROR}>:-Werror>)
    endif()
endfunction()
