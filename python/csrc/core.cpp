// The torch-free part of the Python package: what NumPy users and the cache's bookkeeping need.
#include "core_bindings.hpp"
#include "turboquant/version.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "TurboQuant's C++ library.";
  module.attr("__version__") = turboquant::version();
  turboquant::python::bind_math(module);
  turboquant::python::bind_packing(module);
  turboquant::python::bind_quantizers(module);
  turboquant::python::bind_cache(module);
  turboquant::python::bind_fixed(module);
}
