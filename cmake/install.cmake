# Installs the library and a CMake package: find_package(turboquant) gives turboquant::turboquant
# and, where the component cuda is installed too, turboquant::cuda.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(tq_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/turboquant)
install(TARGETS turboquant EXPORT turboquant_targets COMPONENT development
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/turboquant
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development)
install(EXPORT turboquant_targets NAMESPACE turboquant:: FILE turboquant_targets.cmake
        DESTINATION ${tq_package_dir} COMPONENT development)

# An export and a component of its own: the kernels take minutes to compile, and what is not built
# must not be missed.
if(TQ_CUDA_FOUND)
  install(TARGETS turboquant_cuda EXPORT turboquant_cuda_targets COMPONENT cuda
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT turboquant_cuda_targets NAMESPACE turboquant:: FILE turboquant_cuda_targets.cmake
          DESTINATION ${tq_package_dir} COMPONENT cuda)
endif()

configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/turboquant-config.cmake.in
  ${PROJECT_BINARY_DIR}/turboquant-config.cmake INSTALL_DESTINATION ${tq_package_dir})
# Before 1.0 a new minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/turboquant-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/turboquant-config.cmake
              ${PROJECT_BINARY_DIR}/turboquant-config-version.cmake
        DESTINATION ${tq_package_dir} COMPONENT development)
