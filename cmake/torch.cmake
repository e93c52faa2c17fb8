# liblighthouse.so: the torch operators by the stable ABI, one library for every Python and every torch from 2.10 on.
# Its one trap: torch loads its own libraries with RTLD_LOCAL, so ours must name libtorch.so as needed; an empty stub
# of that name at link time does it, and at run time the process has the real one already.

if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR "the torch operators are built on Linux only for now; -DLIGHTHOUSE_TORCH=OFF builds the C++ core")
endif()

set(LIGHTHOUSE_TORCH_INCLUDE_DIR "" CACHE PATH "torch's headers; empty: those of the Python that builds")
set(torch_include ${LIGHTHOUSE_TORCH_INCLUDE_DIR})
if(NOT torch_include)
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  # Without the variables by which pip isolates a build, the same Python sees the environment that is installed into.
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH --unset=PYTHONNOUSERSITE
            ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/find_torch.py
    OUTPUT_VARIABLE torch_include ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT torch_result EQUAL 0)
    message(FATAL_ERROR "lighthouse-attn is built against torch's headers, and ${torch_error}.\n"
      "Install torch first:  pip install \"torch>=2.10\"\n"
      "Or say where the headers are:  pip install . --config-settings=cmake.define.LIGHTHOUSE_TORCH_INCLUDE_DIR=DIR")
  endif()
endif()
if(NOT EXISTS ${torch_include}/torch/csrc/stable/library.h)
  message(FATAL_ERROR "LIGHTHOUSE_TORCH_INCLUDE_DIR=${torch_include}: torch/csrc/stable/library.h is not there; "
    "the include folder of torch 2.10 or later is needed")
endif()
message(STATUS "torch's headers: ${torch_include}")

add_library(lighthouse_torch_stub SHARED cmake/libtorch_stub.cpp)
set_target_properties(lighthouse_torch_stub PROPERTIES OUTPUT_NAME torch
  LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/stub)

file(GLOB torch_sources CONFIGURE_DEPENDS src/torch/*.cpp)
add_library(lighthouse_torch MODULE ${torch_sources})
target_include_directories(lighthouse_torch PRIVATE src)
target_include_directories(lighthouse_torch SYSTEM PRIVATE ${torch_include})
target_compile_definitions(lighthouse_torch PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(lighthouse_torch PRIVATE lighthouse_options lighthouse_core lighthouse_torch_stub)
if(LIGHTHOUSE_CUDA_FOUND)
  # Semicolons would be taken for a list.
  string(REPLACE ";" "," architectures "${LIGHTHOUSE_CUDA_ARCHITECTURES}")
  target_compile_definitions(lighthouse_torch PRIVATE
    LIGHTHOUSE_CUDA LIGHTHOUSE_CUDA_ARCHITECTURES="${architectures}")
  target_link_libraries(lighthouse_torch PRIVATE lighthouse_cuda)
endif()
# One name is exported: the operators register themselves when the library is loaded.
set(symbols ${PROJECT_SOURCE_DIR}/cmake/liblighthouse.map)
target_link_options(lighthouse_torch PRIVATE -Wl,--no-as-needed -Wl,--version-script=${symbols})
set_target_properties(lighthouse_torch PROPERTIES OUTPUT_NAME lighthouse PREFIX lib SUFFIX .so
  LINK_DEPENDS ${symbols} BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "")

install(TARGETS lighthouse_torch LIBRARY DESTINATION lighthouse COMPONENT python)
