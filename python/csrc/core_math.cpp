// Codebooks for Python.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "core_bindings.hpp"
#include "turboquant/math/codebook.hpp"
#include "turboquant/math/density.hpp"
#include "turboquant/math/lloyd_max.hpp"
#include "turboquant/math/vector_codebook.hpp"

namespace turboquant::python {
namespace {

struct SharedVectorCodebook {
  const math::VectorCodebook* book;
};

// A codebook of the library's cache, which lives as long as the process.
struct SharedCodebook {
  const math::Codebook* book;
};

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
  module.def("solve_lloyd_max", &solve, py::arg("dim"), py::arg("bits"));
  py::class_<SharedCodebook>(module, "Codebook")
      .def(py::init([](int dim, int bits) {
             return SharedCodebook{&math::Codebook::sphere(dim, bits)};
           }),
           py::arg("dim"), py::arg("bits"))
      .def_property_readonly("dim", [](SharedCodebook self) { return self.book->dim(); })
      .def_property_readonly("bits", [](SharedCodebook self) { return self.book->bits(); })
      .def_property_readonly("levels",
                             [](SharedCodebook self) { return to_array(self.book->levels()); })
      .def_property_readonly("boundaries",
                             [](SharedCodebook self) { return to_array(self.book->boundaries()); })
      .def_property_readonly("distortion",
                             [](SharedCodebook self) { return self.book->distortion(); })
      .def("__repr__", [](SharedCodebook self) {
        return "Codebook(dim=" + std::to_string(self.book->dim()) +
               ", bits=" + std::to_string(self.book->bits()) + ")";
      });
  py::class_<SharedVectorCodebook>(module, "VectorCodebook")
      .def(py::init([](int bits) {
             return SharedVectorCodebook{&math::VectorCodebook::gaussian(bits)};
           }),
           py::arg("bits"))
      .def_static("exists", &math::VectorCodebook::exists, py::arg("bits"))
      .def_property_readonly("bits", [](SharedVectorCodebook self) { return self.book->bits(); })
      .def_property_readonly("levels",
                             [](SharedVectorCodebook self) {
                               auto levels = new_array<float>({math::VectorCodebook::kEntries, 2});
                               std::copy(self.book->levels().begin(), self.book->levels().end(),
                                         levels.mutable_data());
                               return levels;
                             })
      .def_property_readonly("distortion",
                             [](SharedVectorCodebook self) { return self.book->distortion(); })
      .def("__repr__", [](SharedVectorCodebook self) {
        return "VectorCodebook(bits=" + std::to_string(self.book->bits()) + ")";
      });
}

}  // namespace turboquant::python
