# `cmake --install BUILD --prefix DIR --component cpp`: headers, static library, and find_package(lighthouse).

include(CMakePackageConfigHelpers)
set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/lighthouse)
install(DIRECTORY include/lighthouse DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(TARGETS lighthouse_core EXPORT lighthouse ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
set(find_cuda "")
if(LIGHTHOUSE_CUDA_FOUND)
  install(TARGETS lighthouse_cuda EXPORT lighthouse ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
  set(find_cuda "find_dependency(CUDAToolkit)")
endif()
install(EXPORT lighthouse NAMESPACE lighthouse:: FILE lighthouse-targets.cmake DESTINATION ${config_dir} COMPONENT cpp)
file(CONFIGURE OUTPUT lighthouse-config.cmake @ONLY CONTENT [[
include(CMakeFindDependencyMacro)
find_dependency(Threads)
@find_cuda@
include(${CMAKE_CURRENT_LIST_DIR}/lighthouse-targets.cmake)
]])
write_basic_package_version_file(lighthouse-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/lighthouse-config.cmake ${PROJECT_BINARY_DIR}/lighthouse-config-version.cmake
  DESTINATION ${config_dir} COMPONENT cpp)
