# XTOKEN_SANITIZE=1 builds everything with the address and undefined-behaviour sanitizers; any report ends the program.
option(XTOKEN_SANITIZE "Build with AddressSanitizer and UndefinedBehaviorSanitizer" OFF)
if(XTOKEN_SANITIZE)
    add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -Og)
    add_link_options(-fsanitize=address,undefined)
endif()
