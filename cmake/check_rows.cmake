# Fails if an object compiled for AVX2 or AVX-512 defines a weak symbol: an inline function of ours or of the standard
# library. The linker keeps one copy of those for the whole program, and it could be this one, on a CPU that lacks it.

set(checked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "rows_avx")
    continue()
  endif()
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [VWu] [^\n]*" shared "${symbols}")
  if(shared)
    list(JOIN shared "\n  " shared)
    message(FATAL_ERROR "${object} defines\n  ${shared}")
  endif()
  math(EXPR checked "${checked} + 1")
endforeach()
if(checked EQUAL 0)
  message(FATAL_ERROR "no object of a rows_avx*.cpp among: ${OBJECTS}")
endif()
