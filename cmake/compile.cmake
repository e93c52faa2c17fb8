# How all of the project's own code is compiled; the targets link lighthouse_options for it.

set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

add_library(lighthouse_options INTERFACE)
target_compile_features(lighthouse_options INTERFACE cxx_std_20)
# Without contraction to fused multiply-add every instruction set gives the same bits; without errno sqrt is one
# instruction. Neither changes a result.
target_compile_options(lighthouse_options INTERFACE -ffp-contract=off -fno-math-errno)
target_compile_options(lighthouse_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion)
# As g++ has it: clang counts these two among -Wconversion and -Wall.
target_compile_options(lighthouse_options INTERFACE -Wno-sign-conversion -Wno-missing-braces)
if(LIGHTHOUSE_WERROR)
  target_compile_options(lighthouse_options INTERFACE -Werror)
endif()

# Everything, GoogleTest too where it is built here.
if(LIGHTHOUSE_SANITIZE)
  add_compile_options(-fsanitize=${LIGHTHOUSE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${LIGHTHOUSE_SANITIZE})
endif()
