// The torch-free part of the Python package: what NumPy users and the cache's bookkeeping need.
#include <pybind11/pybind11.h>

#include "turboquant/version.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "TurboQuant's C++ library.";
  module.attr("__version__") = turboquant::version();
}
