// What the host does for a cache of fixed capacity: its tables come as NumPy arrays.
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core_bindings.hpp"
#include "turboquant/cache/fixed_append.hpp"
#include "turboquant/cache/layer_spec.hpp"

namespace turboquant::python {
namespace {

using cache::LayerSpec;
using Table = py::array_t<int32_t, py::array::c_style>;

std::span<int32_t> integers(Table& table) {
  return {table.mutable_data(), static_cast<size_t>(table.size())};
}

cache::FixedAppendParams params_of(const LayerSpec& spec, Table& rows, Table& page_table,
                                   Table& positions, int64_t max_tokens) {
  return {.spec = spec,
          .max_tokens = max_tokens,
          .rows = integers(rows),
          .page_table = integers(page_table),
          .positions = integers(positions)};
}

}  // namespace

void bind_fixed(py::module_& module) {
  module.def(
      "entries_of_full_rows",
      [](const LayerSpec& spec, Table rows, Table page_table, Table positions, int64_t max_tokens) {
        return cache::entries_of_full_rows(
            params_of(spec, rows, page_table, positions, max_tokens));
      },
      py::arg("spec"), py::arg("rows"), py::arg("page_table"), py::arg("positions"),
      py::arg("max_tokens"));
  module.def(
      "max_append_jobs",
      [](const LayerSpec& spec, int64_t chunk_tokens) {
        return cache::max_append_pieces(spec.exact_layout(), chunk_tokens);
      },
      py::arg("spec"), py::arg("chunk_tokens"));
  module.def(
      "crop_tables",
      [](const LayerSpec& spec, Table rows, Table page_table, Table positions, int64_t max_tokens,
         const std::vector<int64_t>& new_lengths) {
        cache::crop(params_of(spec, rows, page_table, positions, max_tokens), new_lengths);
      },
      py::arg("spec"), py::arg("rows").noconvert(), py::arg("page_table").noconvert(),
      py::arg("positions").noconvert(), py::arg("max_tokens"), py::arg("new_lengths"));
}

}  // namespace turboquant::python
