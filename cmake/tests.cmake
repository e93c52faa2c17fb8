# The C++ tests (GoogleTest), the examples as tests, and the benchmark (Google Benchmark).
# Both libraries: from the system, else from the sources a system package leaves in /usr/src, else fetched.

function(lighthouse_fetch package url sha256 advice)
  set(archive ${PROJECT_BINARY_DIR}/fetched/${package}.tar.gz)
  set(actual "")
  if(EXISTS ${archive})
    file(SHA256 ${archive} actual)
  endif()
  if(NOT actual STREQUAL sha256)
    message(STATUS "Fetching ${package}")
    file(DOWNLOAD ${url} ${archive} TIMEOUT 120 INACTIVITY_TIMEOUT 20 STATUS status)
    list(GET status 1 reason)
    file(SHA256 ${archive} actual)
    if(NOT actual STREQUAL sha256)
      file(REMOVE ${archive})
      message(FATAL_ERROR "${package} is not installed, and ${url} could not be fetched (${reason}). ${advice}")
    endif()
  endif()
  include(FetchContent)
  FetchContent_Declare(${package} URL ${archive} DOWNLOAD_EXTRACT_TIMESTAMP OFF SYSTEM)
  FetchContent_MakeAvailable(${package})
endfunction()

# Nothing of theirs is compiled with our warnings, installed with our package, or tested with our tests.
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
set(BUILD_GMOCK OFF)
set(INSTALL_GTEST OFF)
set(BENCHMARK_ENABLE_TESTING OFF)
set(BENCHMARK_ENABLE_INSTALL OFF)

if(LIGHTHOUSE_TESTS)
  enable_testing()
  file(GLOB test_sources CONFIGURE_DEPENDS tests/cpp/*.cpp)
  if(NOT LIGHTHOUSE_CUDA_FOUND)
    list(FILTER test_sources EXCLUDE REGEX "/cuda_[^/]*$")
  endif()
  file(GLOB example_sources CONFIGURE_DEPENDS examples/cpp/*.cpp)

  # Sanitizers see into GoogleTest only where it is built here.
  if(NOT LIGHTHOUSE_SANITIZE)
    find_package(GTest QUIET)
  endif()
  if(NOT TARGET GTest::gtest_main)
    if(EXISTS /usr/src/googletest/CMakeLists.txt)
      add_subdirectory(/usr/src/googletest ${PROJECT_BINARY_DIR}/googletest EXCLUDE_FROM_ALL SYSTEM)
    else()
      find_package(GTest QUIET)
    endif()
  endif()
  if(NOT TARGET GTest::gtest_main)
    lighthouse_fetch(googletest https://github.com/google/googletest/archive/refs/tags/v1.15.2.tar.gz
      7b42b4d6ed48810c5362c265a17faebe90dc2373c885e5216439d37927f02926
      "Install it (Debian, Ubuntu: apt-get install libgtest-dev).")
  endif()

  add_executable(lighthouse_tests ${test_sources})
  target_include_directories(lighthouse_tests PRIVATE src tests/cpp)
  target_link_libraries(lighthouse_tests PRIVATE lighthouse_options lighthouse_core GTest::gtest_main)
  if(LIGHTHOUSE_CUDA_FOUND)
    target_compile_definitions(lighthouse_tests PRIVATE LIGHTHOUSE_CUDA)
    target_link_libraries(lighthouse_tests PRIVATE lighthouse_cuda CUDA::cudart_static)
  endif()
  include(GoogleTest)
  gtest_discover_tests(lighthouse_tests DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 300)

  foreach(source IN LISTS example_sources)
    get_filename_component(name ${source} NAME_WE)
    add_executable(example_${name} ${source})
    target_link_libraries(example_${name} PRIVATE lighthouse_options lighthouse_core)
    add_test(NAME example_${name} COMMAND example_${name})
  endforeach()

  # What is compiled for one instruction set may not define a symbol that the linker could take for all.
  if(LIGHTHOUSE_X86 AND NOT LIGHTHOUSE_SANITIZE)
    add_test(NAME rows_define_no_shared_symbol
      COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=$<TARGET_OBJECTS:lighthouse_core>"
              -P ${PROJECT_SOURCE_DIR}/cmake/check_rows.cmake)
  endif()
endif()

if(LIGHTHOUSE_BENCH OR LIGHTHOUSE_TESTS AND NOT LIGHTHOUSE_SANITIZE)
  file(GLOB bench_sources CONFIGURE_DEPENDS bench/cpp/*.cpp)
  find_package(benchmark QUIET)
  if(LIGHTHOUSE_BENCH AND NOT TARGET benchmark::benchmark_main)
    lighthouse_fetch(benchmark https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz
      32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981
      "Install it (Debian, Ubuntu: apt-get install libbenchmark-dev).")
  endif()
  if(bench_sources AND TARGET benchmark::benchmark_main)
    add_executable(lighthouse_bench ${bench_sources})
    target_include_directories(lighthouse_bench PRIVATE src)
    target_link_libraries(lighthouse_bench PRIVATE lighthouse_options lighthouse_core benchmark::benchmark_main)
  endif()
endif()
