// The quantisers on NumPy arrays. Arrays in, new arrays out; the GIL is released while they work.
#include <array>
#include <string>
#include <string_view>

#include "core_bindings.hpp"
#include "turboquant/parallel.hpp"
#include "turboquant/quant/mse.hpp"
#include "turboquant/quant/prod.hpp"
#include "turboquant/quant/rotation.hpp"
#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::python {
namespace {

using quant::Projection;
using quant::RotationKind;
using quant::TurboQuantMse;
using quant::TurboQuantProd;

template <class Enum, size_t kCount>
Enum parse_name(const char* argument, std::string_view name, const std::array<Enum, kCount>& values,
                std::string_view (*name_of)(Enum)) {
  std::string expected;
  for (const Enum value : values) {
    if (name_of(value) == name) return value;
    expected += (expected.empty() ? "" : " or ") + std::string(name_of(value));
  }
  detail::throw_invalid(argument, expected, std::string(name));
}

RotationKind parse_rotation(std::string_view name) {
  return parse_name("rotation", name, std::array{RotationKind::kSignHadamard, RotationKind::kHaar},
                    &quant::rotation_kind_name);
}

Projection parse_projection(std::string_view name) {
  return parse_name("projection", name, std::array{Projection::kOrthogonal, Projection::kGaussian},
                    &quant::projection_name);
}

ParallelFor make_threads(int count) {
  if (count < 0) detail::throw_invalid("threads", "0 (all) or more", std::to_string(count));
  return threads(count);
}

// The named member of an encoded batch, as an array of the wanted type and shape.
template <class T>
InputArray<T> member(const py::dict& encoded, const char* name,
                     const std::vector<py::ssize_t>& shape) {
  if (!encoded.contains(name)) {
    detail::throw_invalid("codes", std::string("a member '") + name + "'",
                          py::str(encoded).cast<std::string>());
  }
  auto array = InputArray<T>::ensure(encoded[name]);
  if (!array) {
    PyErr_Clear();
    detail::throw_invalid(name, "an array", py::repr(encoded[name]).cast<std::string>());
  }
  check_shape(name, array, shape);
  return array;
}

// Runs work() without the GIL.
template <class Work>
void unlocked(Work work) {
  const py::gil_scoped_release release;
  work();
}

py::dict mse_encode(const TurboQuantMse& quantizer, const InputArray<float>& rows,
                    int num_threads) {
  check_shape("rows", rows, {-1, quantizer.dim()});
  const ParallelFor parallel = make_threads(num_threads);
  auto codes = new_array<uint8_t>({rows.shape(0), quantizer.row_bytes()});
  auto scales = new_array<float>({rows.shape(0)});
  const auto from = elements(rows);
  const auto to_codes = elements(codes);
  const auto to_scales = elements(scales);
  unlocked([&] { quantizer.encode(from, to_codes, to_scales, parallel); });
  py::dict encoded;
  encoded["codes"] = codes;
  encoded["scales"] = scales;
  return encoded;
}

py::array_t<float> mse_decode(const TurboQuantMse& quantizer, const py::dict& encoded,
                              int num_threads) {
  const auto codes = member<uint8_t>(encoded, "codes", {-1, quantizer.row_bytes()});
  const auto scales = member<float>(encoded, "scales", {codes.shape(0)});
  const ParallelFor parallel = make_threads(num_threads);
  auto rows = new_array<float>({codes.shape(0), quantizer.dim()});
  const auto from_codes = elements(codes);
  const auto from_scales = elements(scales);
  const auto to = elements(rows);
  unlocked([&] { quantizer.decode(from_codes, from_scales, to, parallel); });
  return rows;
}

py::array_t<float> mse_score(const TurboQuantMse& quantizer, const InputArray<float>& queries,
                             const py::dict& encoded, int num_threads) {
  check_shape("queries", queries, {-1, quantizer.dim()});
  const auto codes = member<uint8_t>(encoded, "codes", {-1, quantizer.row_bytes()});
  const auto scales = member<float>(encoded, "scales", {codes.shape(0)});
  const ParallelFor parallel = make_threads(num_threads);
  auto scores = new_array<float>({queries.shape(0), codes.shape(0)});
  const auto from_queries = elements(queries);
  const auto from_codes = elements(codes);
  const auto from_scales = elements(scales);
  const auto to = elements(scores);
  unlocked([&] { quantizer.score(from_queries, from_codes, from_scales, to, parallel); });
  return scores;
}

py::array_t<float> mse_rotate(const TurboQuantMse& quantizer, const InputArray<float>& rows) {
  check_shape("rows", rows, {-1, quantizer.dim()});
  auto rotated = new_array<float>({rows.shape(0), rows.shape(1)});
  std::copy(rows.data(), rows.data() + rows.size(), rotated.mutable_data());
  quantizer.rotation().apply(rotated.mutable_data(), rotated.shape(0));
  return rotated;
}

py::dict prod_encode(const TurboQuantProd& quantizer, const InputArray<float>& rows,
                     int num_threads) {
  check_shape("rows", rows, {-1, quantizer.dim()});
  const ParallelFor parallel = make_threads(num_threads);
  auto codes = new_array<uint8_t>({rows.shape(0), quantizer.row_bytes()});
  auto scales = new_array<float>({rows.shape(0)});
  auto residual_norms = new_array<float>({rows.shape(0)});
  const auto from = elements(rows);
  const auto to_codes = elements(codes);
  const auto to_scales = elements(scales);
  const auto to_norms = elements(residual_norms);
  unlocked([&] { quantizer.encode(from, to_codes, to_scales, to_norms, parallel); });
  py::dict encoded;
  encoded["codes"] = codes;
  encoded["scales"] = scales;
  encoded["residual_norms"] = residual_norms;
  return encoded;
}

py::array_t<float> prod_decode(const TurboQuantProd& quantizer, const py::dict& encoded,
                               int num_threads) {
  const auto codes = member<uint8_t>(encoded, "codes", {-1, quantizer.row_bytes()});
  const auto scales = member<float>(encoded, "scales", {codes.shape(0)});
  const auto norms = member<float>(encoded, "residual_norms", {codes.shape(0)});
  const ParallelFor parallel = make_threads(num_threads);
  auto rows = new_array<float>({codes.shape(0), quantizer.dim()});
  const auto from_codes = elements(codes);
  const auto from_scales = elements(scales);
  const auto from_norms = elements(norms);
  const auto to = elements(rows);
  unlocked([&] { quantizer.decode(from_codes, from_scales, from_norms, to, parallel); });
  return rows;
}

py::array_t<float> prod_score(const TurboQuantProd& quantizer, const InputArray<float>& queries,
                              const py::dict& encoded, int num_threads) {
  check_shape("queries", queries, {-1, quantizer.dim()});
  const auto codes = member<uint8_t>(encoded, "codes", {-1, quantizer.row_bytes()});
  const auto scales = member<float>(encoded, "scales", {codes.shape(0)});
  const auto norms = member<float>(encoded, "residual_norms", {codes.shape(0)});
  const ParallelFor parallel = make_threads(num_threads);
  auto scores = new_array<float>({queries.shape(0), codes.shape(0)});
  const auto from_queries = elements(queries);
  const auto from_codes = elements(codes);
  const auto from_scales = elements(scales);
  const auto from_norms = elements(norms);
  const auto to = elements(scores);
  unlocked(
      [&] { quantizer.score(from_queries, from_codes, from_scales, from_norms, to, parallel); });
  return scores;
}

template <class Quantizer>
void bind_batches(py::class_<Quantizer>& bound,
                  py::dict (*encode)(const Quantizer&, const InputArray<float>&, int),
                  py::array_t<float> (*decode)(const Quantizer&, const py::dict&, int),
                  py::array_t<float> (*score)(const Quantizer&, const InputArray<float>&,
                                              const py::dict&, int)) {
  bound.def_property_readonly("dim", &Quantizer::dim)
      .def_property_readonly("bits", &Quantizer::bits)
      .def_property_readonly("row_bytes", &Quantizer::row_bytes)
      .def("encode", encode, py::arg("rows"), py::arg("threads") = 0)
      .def("decode", decode, py::arg("codes"), py::arg("threads") = 0)
      .def("score", score, py::arg("queries"), py::arg("codes"), py::arg("threads") = 0);
}

}  // namespace

void bind_quantizers(py::module_& module) {
  py::class_<TurboQuantMse> mse(module, "TurboQuantMse");
  mse.def(py::init([](int dim, int bits, uint64_t seed, std::string_view scale_rule,
                      std::string_view rotation) {
            return TurboQuantMse(dim, bits, seed, quant::parse_scale_rule(scale_rule),
                                 parse_rotation(rotation));
          }),
          py::arg("dim"), py::arg("bits"), py::arg("seed") = 42, py::arg("scale_rule") = "norm",
          py::arg("rotation") = "sign_hadamard");
  mse.def("rotate", &mse_rotate, py::arg("rows"));
  bind_batches(mse, &mse_encode, &mse_decode, &mse_score);

  py::class_<TurboQuantProd> prod(module, "TurboQuantProd");
  prod.def(py::init([](int dim, int bits, uint64_t seed, std::string_view projection,
                       std::string_view rotation) {
             return TurboQuantProd(dim, bits, seed, parse_projection(projection),
                                   parse_rotation(rotation));
           }),
           py::arg("dim"), py::arg("bits"), py::arg("seed") = 42,
           py::arg("projection") = "orthogonal", py::arg("rotation") = "sign_hadamard");
  prod.def_property_readonly("expected_variance", &TurboQuantProd::expected_variance);
  bind_batches(prod, &prod_encode, &prod_decode, &prod_score);
}

}  // namespace turboquant::python
