# The CUDA kernels: lighthouse_cuda, a static library on top of the core. cudart is linked statically, so that nothing
# depends on which CUDA the process brings; the driver is looked for when a kernel is first launched.
# LIGHTHOUSE_CUDA=AUTO builds them where nvcc is found; ON fails where it is not.

if(LIGHTHOUSE_CUDA)
  if(DEFINED ENV{CUDACXX} AND NOT DEFINED LIGHTHOUSE_NVCC)
    set(LIGHTHOUSE_NVCC "$ENV{CUDACXX}" CACHE FILEPATH "CUDA's compiler")
  endif()
  find_program(LIGHTHOUSE_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin
    DOC "CUDA's compiler")
  set(reason "")
  if(NOT LIGHTHOUSE_NVCC)
    set(reason "nvcc is not found (looked in PATH, CUDA_HOME and /usr/local/cuda; CUDACXX=.../nvcc names another)")
  elseif(CMAKE_VERSION VERSION_LESS 3.26)
    set(reason "CMake ${CMAKE_VERSION} cannot compile C++20 with nvcc; 3.26 or later is needed")
  else()
    execute_process(COMMAND ${LIGHTHOUSE_NVCC} --version OUTPUT_VARIABLE nvcc_version ERROR_VARIABLE nvcc_error)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${nvcc_version}")
    set(nvcc_version "${CMAKE_MATCH_1}")
    if(nvcc_version STREQUAL "")
      set(reason "${LIGHTHOUSE_NVCC} does not run as nvcc does")
    elseif(nvcc_version VERSION_LESS 12.8)
      set(reason "${LIGHTHOUSE_NVCC} is of CUDA ${nvcc_version}; 12.8 or later is needed")
    endif()
  endif()
  if(reason STREQUAL "")
    set(LIGHTHOUSE_CUDA_FOUND ON)
    message(STATUS "CUDA kernels: ${LIGHTHOUSE_NVCC}, CUDA ${nvcc_version}, for ${LIGHTHOUSE_CUDA_ARCHITECTURES}")
  elseif(LIGHTHOUSE_CUDA STREQUAL "AUTO")
    set(LIGHTHOUSE_CUDA_FOUND OFF)
    message(STATUS "No CUDA kernels: ${reason}")
  else()
    message(FATAL_ERROR "LIGHTHOUSE_CUDA=${LIGHTHOUSE_CUDA}: ${reason}")
  endif()
endif()

if(LIGHTHOUSE_CUDA_FOUND)
  set(CMAKE_CUDA_COMPILER ${LIGHTHOUSE_NVCC})
  set(CMAKE_CUDA_ARCHITECTURES ${LIGHTHOUSE_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)

  file(GLOB cuda_sources CONFIGURE_DEPENDS src/cuda/*.cu)
  add_library(lighthouse_cuda STATIC ${cuda_sources})
  add_library(lighthouse::cuda ALIAS lighthouse_cuda)
  target_include_directories(lighthouse_cuda PRIVATE src)
  target_compile_features(lighthouse_cuda PUBLIC cxx_std_20 PRIVATE cuda_std_20)
  # As on the host, nothing is contracted to fused multiply-add, so that the device has the host's bits. The rules'
  # constexpr functions run on the device as they are. Several architectures make a library of megabytes: compressed it
  # is a tenth.
  target_compile_options(lighthouse_cuda PRIVATE
    -fmad=false --expt-relaxed-constexpr --extended-lambda -compress-mode=size -Xcompiler=-Wall,-Wextra,-ffp-contract=off
    $<$<BOOL:${LIGHTHOUSE_WERROR}>:-Werror=all-warnings>)
  target_link_libraries(lighthouse_cuda PUBLIC lighthouse_core PRIVATE CUDA::cudart_static)
  set_target_properties(lighthouse_cuda PROPERTIES EXPORT_NAME cuda)
endif()
