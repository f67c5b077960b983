# Everything nvcc is told, in one place. CMake 3.25 knows no family architectures, so the -gencode
# list is passed as plain flags.
#
# 90a: Hopper's own instructions. Machine code is made for every entry, PTX for the last one.
set(TQ_CUDA_ARCHITECTURES 80 86 89 90a 100 120 CACHE STRING
    "Compute capabilities to compile for; the last one is embedded as PTX too")

set(TQ_CUDA_FOUND OFF)
if(NOT TQ_ENABLE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TQ_ENABLE_CUDA: expected AUTO, ON or OFF, got '${TQ_ENABLE_CUDA}'")
endif()
file(GLOB_RECURSE tq_cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/kernels/*.cu)
if(NOT TQ_ENABLE_CUDA STREQUAL "OFF" AND tq_cuda_sources)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    # turboquant asks its users for C++20, and CMake 3.25 cannot tell nvcc 13 so.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
    set(TQ_CUDA_FOUND ON)
  elseif(TQ_ENABLE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TQ_ENABLE_CUDA=ON, but no CUDA compiler was found (set CUDACXX)")
  else()
    message(STATUS "turboquant: nvcc not found, building without CUDA kernels")
  endif()
endif()

# tq_set_cuda_flags(target): architectures and the spill check. ptxas reports
# spills at compile time, so a kernel that outgrows its registers fails the build without a GPU.
function(tq_set_cuda_flags target)
  set(gencode "")
  foreach(arch IN LISTS TQ_CUDA_ARCHITECTURES)
    list(APPEND gencode "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  endforeach()
  # An architecture with a letter runs on that chip alone: its PTX would serve nothing newer.
  list(GET TQ_CUDA_ARCHITECTURES -1 newest)
  if(NOT newest MATCHES "[a-z]$")
    list(APPEND gencode "SHELL:-gencode arch=compute_${newest},code=compute_${newest}")
  endif()
  # 554: a view's conversion to const is for views that are not; nvcc warns where they are.
  set(flags --expt-relaxed-constexpr -diag-suppress=554 ${gencode}
            "SHELL:-Xptxas --warn-on-spills,-Werror")
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${flags}>")
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endfunction()
