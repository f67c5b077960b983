// Codebooks for Python.
#include <pybind11/stl.h>

#include <optional>

#include "core_bindings.hpp"
#include "turboquant/math/codebook.hpp"
#include "turboquant/math/density.hpp"
#include "turboquant/math/lloyd_max.hpp"

namespace turboquant::python {
namespace {

py::dict solve(std::optional<int> dim, int bits) {
  const math::LloydMaxSolution solution = [&] {
    const py::gil_scoped_release unlocked;
    return dim ? math::solve_lloyd_max(math::SphereMarginal(*dim), bits)
               : math::solve_lloyd_max(math::Gaussian(), bits);
  }();
  py::dict result;
  result["levels"] = to_array(solution.levels);
  result["boundaries"] = to_array(solution.boundaries);
  result["distortion"] = solution.distortion;
  result["residual"] = solution.residual;
  result["iterations"] = solution.iterations;
  return result;
}

}  // namespace

void bind_math(py::module_& module) {
  using math::Codebook;
  module.def("solve_lloyd_max", &solve, py::arg("dim"), py::arg("bits"));
  // Codebooks are shared and live as long as the process: Python never owns one.
  py::class_<Codebook, std::unique_ptr<Codebook, py::nodelete>>(module, "Codebook")
      .def_static("sphere", &Codebook::sphere, py::arg("dim"), py::arg("bits"),
                  py::return_value_policy::reference)
      .def_property_readonly("dim", &Codebook::dim)
      .def_property_readonly("bits", &Codebook::bits)
      .def_property_readonly("levels", [](const Codebook& book) { return to_array(book.levels()); })
      .def_property_readonly("boundaries",
                             [](const Codebook& book) { return to_array(book.boundaries()); })
      .def_property_readonly("distortion", &Codebook::distortion)
      .def("__repr__", [](const Codebook& book) {
        return "Codebook(dim=" + std::to_string(book.dim()) +
               ", bits=" + std::to_string(book.bits()) + ")";
      });
}

}  // namespace turboquant::python
