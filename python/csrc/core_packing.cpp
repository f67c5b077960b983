// Packed rows and the encoder's instruction set for Python.
#include <string>

#include "core_bindings.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::python {
namespace {

// Codes [n, dim] <-> packed rows [n, row_bytes].
py::array_t<uint8_t> pack_rows(const InputArray<uint8_t>& codes, int bits) {
  quant::check_bits(bits);
  check_shape("codes", codes, {-1, -1});
  for (const uint8_t code : elements(codes)) {
    if (code >> bits) {
      detail::throw_invalid("codes", "below " + std::to_string(1 << bits), std::to_string(code));
    }
  }
  const int64_t dim = codes.shape(1);
  auto packed = new_array<uint8_t>({codes.shape(0), quant::packed_row_bytes(dim, bits)});
  for (py::ssize_t n = 0; n < codes.shape(0); ++n) {
    quant::pack_row(codes.data(n, 0), dim, bits, packed.mutable_data(n, 0));
  }
  return packed;
}

py::array_t<uint8_t> unpack_rows(const InputArray<uint8_t>& packed, int64_t dim, int bits) {
  quant::check_bits(bits);
  if (dim < 1) detail::throw_invalid("dim", "at least 1", std::to_string(dim));
  check_shape("packed", packed, {-1, quant::packed_row_bytes(dim, bits)});
  auto codes = new_array<uint8_t>({packed.shape(0), dim});
  for (py::ssize_t n = 0; n < packed.shape(0); ++n) {
    quant::unpack_row(packed.data(n, 0), dim, bits, codes.mutable_data(n, 0));
  }
  return codes;
}

}  // namespace

void bind_packing(py::module_& module) {
  module.def("simd_level",
             [] { return std::string(quant::simd_level_name(quant::active_simd_level())); });
  module.def("pack_rows", &pack_rows, py::arg("codes"), py::arg("bits"));
  module.def("unpack_rows", &unpack_rows, py::arg("packed"), py::arg("dim"), py::arg("bits"));
}

}  // namespace turboquant::python
