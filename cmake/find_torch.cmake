# tq_find_torch(minimum): the torch of the interpreter the package is built for, without importing
# it and without find_package(Torch), which asks for a CUDA toolkit. Sets TQ_TORCH_FOUND and
# TQ_TORCH_INCLUDE_DIR, TQ_TORCH_CPU_LIBRARY, TQ_TORCH_TARGET_VERSION, or TQ_TORCH_PROBLEM.
#
# Under pip's build isolation torch is not importable, but the target's site-packages still is
# what sysconfig says, so torch is found there. TQ_TORCH_ROOT (the folder of torch/__init__.py)
# overrides the search.
set(TQ_TORCH_ROOT "" CACHE PATH "Folder of an installed torch package; empty = ask Python")

function(tq_find_torch minimum)
  set(TQ_TORCH_FOUND OFF PARENT_SCOPE)
  set(root "${TQ_TORCH_ROOT}")
  if(NOT root)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c [[
import importlib.util, pathlib, sysconfig
spec = importlib.util.find_spec("torch")
roots = list(spec.submodule_search_locations or []) if spec else []
roots += [pathlib.Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
print(next((root for root in roots if (pathlib.Path(root) / "version.py").is_file()), ""))
]]
      OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(NOT root OR NOT EXISTS "${root}/version.py")
    set(TQ_TORCH_PROBLEM "torch not found" PARENT_SCOPE)
    return()
  endif()

  file(STRINGS "${root}/version.py" version_line REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" version "${version_line}")
  if(version VERSION_LESS minimum)
    set(TQ_TORCH_PROBLEM "torch ${version} is older than ${minimum}" PARENT_SCOPE)
    return()
  endif()
  set(library "${root}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}")
  if(NOT EXISTS "${library}" OR NOT EXISTS "${root}/include/torch/csrc/stable/library.h")
    set(TQ_TORCH_PROBLEM "torch ${version} has no stable ABI headers or libtorch_cpu"
        PARENT_SCOPE)
    return()
  endif()

  # (major << 56) | (minor << 48): the oldest torch the operators load into.
  string(REPLACE "." ";" parts ${minimum})
  list(GET parts 0 major)
  list(GET parts 1 minor)
  math(EXPR target "(${major} << 56) | (${minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)
  message(STATUS "turboquant-cpp: torch operators against torch ${version} in ${root}")
  set(TQ_TORCH_FOUND ON PARENT_SCOPE)
  set(TQ_TORCH_INCLUDE_DIR "${root}/include" PARENT_SCOPE)
  set(TQ_TORCH_CPU_LIBRARY "${library}" PARENT_SCOPE)
  set(TQ_TORCH_TARGET_VERSION "${target}ULL" PARENT_SCOPE)
endfunction()
