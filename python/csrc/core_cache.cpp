// Layer specs, layout and page table for Python. Storage stays with the caller.
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "core_bindings.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cuda/params_checks.hpp"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/math/half.hpp"
#include "turboquant/quant/codebook_kind.hpp"
#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::python {
namespace {

using cache::AppendPlan;
using cache::BlockLayout;
using cache::LayerSpec;
using cache::PageTable;
using cache::ScaleType;

std::string_view scale_type_name(ScaleType type) {
  return type == ScaleType::kFloat16 ? "float16" : "float32";
}

ScaleType parse_scale_type(std::string_view name) {
  for (const ScaleType type : {ScaleType::kFloat32, ScaleType::kFloat16}) {
    if (name == scale_type_name(type)) return type;
  }
  detail::throw_invalid("scale_type", "float32 or float16", std::string(name));
}

LayerSpec make_spec(int head_dim, int num_kv_heads, int k_bits, int v_bits, std::string_view k_rule,
                    std::string_view v_rule, std::string_view scale_type, bool center_keys,
                    bool smooth_keys, int sink_tokens, int window_tokens, uint64_t seed, int layer,
                    std::string_view codebook) {
  const LayerSpec spec{.head_dim = head_dim,
                       .num_kv_heads = num_kv_heads,
                       .k_bits = k_bits,
                       .v_bits = v_bits,
                       .k_rule = quant::parse_scale_rule(k_rule),
                       .v_rule = quant::parse_scale_rule(v_rule),
                       .scale_type = parse_scale_type(scale_type),
                       .center_keys = center_keys,
                       .smooth_keys = smooth_keys,
                       .sink_tokens = sink_tokens,
                       .window_tokens = window_tokens,
                       .seed = seed,
                       .layer = layer,
                       .codebook = quant::parse_codebook_kind(codebook)};
  spec.validate();
  return spec;
}

std::string spec_text(const LayerSpec& spec) {
  const auto flag = [](bool on) { return on ? "True" : "False"; };
  std::string text = "LayerSpec(head_dim=" + std::to_string(spec.head_dim);
  text += ", num_kv_heads=" + std::to_string(spec.num_kv_heads);
  text += ", k_bits=" + std::to_string(spec.k_bits);
  text += ", v_bits=" + std::to_string(spec.v_bits);
  text += ", k_rule='" + std::string(quant::scale_rule_name(spec.k_rule));
  text += "', v_rule='" + std::string(quant::scale_rule_name(spec.v_rule));
  text += "', scale_type='" + std::string(scale_type_name(spec.scale_type));
  text += std::string("', center_keys=") + flag(spec.center_keys);
  text += std::string(", smooth_keys=") + flag(spec.smooth_keys);
  text += ", sink_tokens=" + std::to_string(spec.sink_tokens);
  text += ", window_tokens=" + std::to_string(spec.window_tokens);
  text += ", seed=" + std::to_string(spec.seed);
  text += ", layer=" + std::to_string(spec.layer);
  return text + ", codebook='" + std::string(quant::codebook_kind_name(spec.codebook)) + "')";
}

// int32 table [rows, columns] from a flat vector.
py::array_t<int32_t> table(const std::vector<int32_t>& flat, std::vector<py::ssize_t> shape) {
  auto array = new_array<int32_t>(shape);
  std::copy(flat.begin(), flat.end(), array.mutable_data());
  return array;
}

template <class Row>
py::array_t<int32_t> table_of(const std::vector<Row>& rows) {
  constexpr py::ssize_t kColumns = sizeof(Row) / sizeof(int32_t);
  auto array = new_array<int32_t>({static_cast<py::ssize_t>(rows.size()), kColumns});
  if (!rows.empty()) std::memcpy(array.mutable_data(), rows.data(), rows.size() * sizeof(Row));
  return array;
}

// Packed rows [n, tokens, row_bytes] and scales [n, tokens] of the first tokens of n blocks.
py::tuple block_rows(const BlockLayout& layout, const InputArray<uint8_t>& blocks,
                     std::string_view kind, int tokens) {
  check_shape("blocks", blocks, {-1, layout.block_bytes()});
  if (kind != "k" && kind != "v") detail::throw_invalid("kind", "k or v", std::string(kind));
  if (tokens < 0 || tokens > cache::kBlockTokens) {
    detail::throw_invalid("tokens", "0 to " + std::to_string(cache::kBlockTokens),
                          std::to_string(tokens));
  }
  const bool keys = kind == "k";
  const int64_t row_bytes = keys ? layout.k_row_bytes() : layout.v_row_bytes();
  auto packed = new_array<uint8_t>({blocks.shape(0), tokens, row_bytes});
  auto scales = new_array<float>({blocks.shape(0), tokens});
  uint8_t* to_packed = packed.mutable_data();
  float* to_scale = scales.mutable_data();
  for (py::ssize_t n = 0; n < blocks.shape(0); ++n) {
    const uint8_t* block = blocks.data(n, 0);
    for (int t = 0; t < tokens; ++t, to_packed += row_bytes, ++to_scale) {
      std::memcpy(to_packed, block + (keys ? layout.k_row(t) : layout.v_row(t)), row_bytes);
      const uint8_t* scale = block + (keys ? layout.k_scale(t) : layout.v_scale(t));
      if (layout.scale_bytes == 2) {
        uint16_t half;
        std::memcpy(&half, scale, sizeof(half));
        *to_scale = math::fp32_from_fp16(half);
      } else {
        std::memcpy(to_scale, scale, sizeof(float));
      }
    }
  }
  return py::make_tuple(packed, scales);
}

std::vector<int64_t> lengths(const PageTable& pages) {
  std::vector<int64_t> result;
  for (int row = 0; row < pages.batch_size(); ++row) result.push_back(pages.length(row));
  return result;
}

// Whether every key mean of n blocks is finite, as encoding leaves them.
bool means_are_finite(const BlockLayout& layout, const InputArray<uint8_t>& blocks) {
  check_shape("blocks", blocks, {-1, layout.block_bytes()});
  if (!layout.has_mean) return true;
  for (py::ssize_t n = 0; n < blocks.shape(0); ++n) {
    for (int c = 0; c < layout.head_dim; ++c) {
      uint16_t half;
      std::memcpy(&half, blocks.data(n, layout.k_mean_offset()) + c * sizeof half, sizeof half);
      if (!std::isfinite(math::fp32_from_fp16(half))) return false;
    }
  }
  return true;
}

// R of one head, row-major [dim, dim]: rotated = R x. Built from the images of the unit vectors,
// which are R's columns.
py::array_t<float> rotation_matrix(const LayerSpec& spec, int head, std::string_view kind) {
  if (kind != "k" && kind != "v") detail::throw_invalid("kind", "k or v", std::string(kind));
  if (head < 0 || head >= spec.num_kv_heads) {
    detail::throw_invalid("head", "0 to " + std::to_string(spec.num_kv_heads - 1),
                          std::to_string(head));
  }
  const auto codec = cache::LayerCodec::get(spec);
  const auto& side = kind == "k" ? codec->keys() : codec->values();
  const size_t dim = spec.head_dim;
  std::vector<float> images(dim * dim);
  for (size_t i = 0; i < dim; ++i) images[i * dim + i] = 1.0f;
  side.rotations[head].apply(images.data(), spec.head_dim);
  auto matrix = new_array<float>({spec.head_dim, spec.head_dim});
  for (size_t row = 0; row < dim; ++row) {
    for (size_t column = 0; column < dim; ++column) {
      matrix.mutable_data()[row * dim + column] = images[column * dim + row];
    }
  }
  return matrix;
}

PageTable table_from_exports(const LayerSpec& spec, const InputArray<int32_t>& rows,
                             const InputArray<int32_t>& page_table, int64_t num_pages) {
  check_shape("rows", rows, {-1, cache::tables::kRowColumns});
  check_shape("page_table", page_table, {rows.shape(0), -1, cache::tables::kPageColumns});
  return PageTable::from_exports(spec.sink_tokens, spec.window_tokens, elements(rows),
                                 elements(page_table), num_pages);
}

std::vector<size_t> num_entries(const PageTable& pages) {
  std::vector<size_t> result;
  for (int row = 0; row < pages.batch_size(); ++row) result.push_back(pages.entries(row).size());
  return result;
}

// Why attention on CUDA devices does not take a layer; empty when it does.
std::string cuda_attention_problem(const LayerSpec& spec, int capability_major) {
  if (!cuda::extend_attention_runs_on(capability_major)) {
    return "CUDA attention runs on compute capability 8.0 or newer, got " +
           std::to_string(capability_major) + ".x";
  }
  if (!cuda::decode_attention_supported(spec)) {
    const auto [expected, actual] = cuda::decode_attention_support(spec);
    return "CUDA attention takes " + expected + ", got " + actual;
  }
  return "";
}

void bind_spec(py::module_& module) {
  const LayerSpec defaults;
  const auto name = [](quant::ScaleRule rule) { return std::string(quant::scale_rule_name(rule)); };
  py::class_<LayerSpec>(module, "LayerSpec")
      .def(py::init(&make_spec), py::kw_only(), py::arg("head_dim"), py::arg("num_kv_heads"),
           py::arg("k_bits") = defaults.k_bits, py::arg("v_bits") = defaults.v_bits,
           py::arg("k_rule") = name(defaults.k_rule), py::arg("v_rule") = name(defaults.v_rule),
           py::arg("scale_type") = std::string(scale_type_name(defaults.scale_type)),
           py::arg("center_keys") = defaults.center_keys,
           py::arg("smooth_keys") = defaults.smooth_keys,
           py::arg("sink_tokens") = defaults.sink_tokens,
           py::arg("window_tokens") = defaults.window_tokens, py::arg("seed") = defaults.seed,
           py::arg("layer") = defaults.layer,
           py::arg("codebook") = std::string(quant::codebook_kind_name(defaults.codebook)))
      .def_readonly("head_dim", &LayerSpec::head_dim)
      .def_readonly("num_kv_heads", &LayerSpec::num_kv_heads)
      .def_readonly("k_bits", &LayerSpec::k_bits)
      .def_readonly("v_bits", &LayerSpec::v_bits)
      .def_property_readonly("k_rule", [name](const LayerSpec& spec) { return name(spec.k_rule); })
      .def_property_readonly("v_rule", [name](const LayerSpec& spec) { return name(spec.v_rule); })
      .def_property_readonly("scale_type",
                             [](const LayerSpec& spec) { return scale_type_name(spec.scale_type); })
      .def_readonly("center_keys", &LayerSpec::center_keys)
      .def_readonly("smooth_keys", &LayerSpec::smooth_keys)
      .def_readonly("sink_tokens", &LayerSpec::sink_tokens)
      .def_readonly("window_tokens", &LayerSpec::window_tokens)
      .def_property_readonly("exact_capacity",
                             [](const LayerSpec& spec) { return spec.exact_layout().capacity(); })
      .def_readonly("seed", &LayerSpec::seed)
      .def_readonly("layer", &LayerSpec::layer)
      .def_property_readonly(
          "codebook",
          [](const LayerSpec& spec) { return quant::codebook_kind_name(spec.codebook); })
      .def("to_ints", &LayerSpec::to_ints)
      .def_static("from_ints",
                  [](const std::vector<int64_t>& ints) { return LayerSpec::from_ints(ints); })
      .def("__eq__", [](const LayerSpec& a, const LayerSpec& b) { return a == b; })
      .def("__hash__",
           [](const LayerSpec& spec) { return py::hash(py::tuple(py::cast(spec.to_ints()))); })
      .def("__repr__", &spec_text)
      .def(py::pickle([](const LayerSpec& spec) { return spec.to_ints(); },
                      [](const std::vector<int64_t>& ints) { return LayerSpec::from_ints(ints); }));
  module.def("rotation_matrix", &rotation_matrix, py::arg("spec"), py::arg("head"),
             py::arg("kind"));
  module.attr("CUDA_MAX_HEAD_DIM") = cuda::kMaxHeadDim;
  module.def("cuda_attention_problem", &cuda_attention_problem, py::arg("spec"),
             py::arg("capability_major"));
}

void bind_layout(py::module_& module) {
  module.attr("BLOCK_TOKENS") = cache::kBlockTokens;
  py::class_<BlockLayout>(module, "BlockLayout")
      .def(py::init([](const LayerSpec& spec) { return spec.block_layout(); }), py::arg("spec"))
      .def_property_readonly("block_bytes", &BlockLayout::block_bytes)
      .def_property_readonly("k_row_bytes", &BlockLayout::k_row_bytes)
      .def_property_readonly("v_row_bytes", &BlockLayout::v_row_bytes)
      .def("page_bytes", &BlockLayout::page_bytes, py::arg("num_kv_heads"))
      .def("rows", &block_rows, py::arg("blocks"), py::arg("kind"), py::arg("tokens"))
      .def("means_are_finite", &means_are_finite, py::arg("blocks"));
}

void bind_page_table(py::module_& module) {
  py::class_<AppendPlan>(module, "AppendPlan")
      .def_property_readonly("copies", [](const AppendPlan& plan) { return table_of(plan.copies); })
      .def_property_readonly("jobs", [](const AppendPlan& plan) { return table_of(plan.jobs); })
      .def_property_readonly("moves_tokens",
                             [](const AppendPlan& plan) { return !plan.jobs.empty(); })
      .def_readonly("pages_needed", &AppendPlan::pages_needed);

  py::class_<PageTable>(module, "PageTable")
      .def(py::init([](const LayerSpec& spec, int batch_size) {
             return PageTable(batch_size, spec.sink_tokens, spec.window_tokens);
           }),
           py::arg("spec"), py::arg("batch_size"))
      .def_static("from_exports", &table_from_exports, py::arg("spec"), py::arg("rows"),
                  py::arg("page_table"), py::arg("num_pages"))
      .def_property_readonly("batch_size", &PageTable::batch_size)
      .def_property_readonly("lengths", &lengths)
      .def_property_readonly("num_entries", &num_entries)
      .def_property_readonly("used_pages", &PageTable::used_pages)
      .def(
          "plan_append",
          [](const PageTable& pages, const std::vector<int32_t>& new_tokens) {
            return pages.plan_append(new_tokens);
          },
          py::arg("new_tokens"))
      .def("prepare", &PageTable::prepare, py::arg("plan"))
      .def("commit", &PageTable::commit, py::arg("plan"))
      .def("crop", &PageTable::crop, py::arg("row"), py::arg("new_length"))
      .def(
          "select",
          [](PageTable& pages, const std::vector<int64_t>& indices) { pages.select(indices); },
          py::arg("indices"))
      .def("reset", &PageTable::reset)
      .def("high_water_pages", &PageTable::high_water_pages)
      .def("page_table",
           [](const PageTable& pages) {
             const int64_t columns = pages.max_entries();
             return table(pages.export_page_table(columns),
                          {pages.batch_size(), columns, cache::tables::kPageColumns});
           })
      .def(
          "rows",
          [](const PageTable& pages, const std::vector<int32_t>& new_tokens) {
            return table(pages.export_rows(new_tokens),
                         {pages.batch_size(), cache::tables::kRowColumns});
          },
          py::arg("new_tokens") = std::vector<int32_t>())
      .def("live_slots",
           [](const PageTable& pages) {
             const std::vector<uint8_t> live = pages.export_live_slots();
             const auto capacity = static_cast<py::ssize_t>(live.size()) / pages.batch_size();
             auto array = new_array<bool>({pages.batch_size(), capacity});
             std::copy(live.begin(), live.end(), array.mutable_data());
             return array;
           })
      .def("clone", [](const PageTable& pages) { return PageTable(pages); });
}

}  // namespace

void bind_cache(py::module_& module) {
  bind_spec(module);
  bind_layout(module);
  bind_page_table(module);
}

}  // namespace turboquant::python
