// Ranges of a random layer to dequantise, for backends that must give the CPU's numbers.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "append_cases.hpp"
#include "tensor.hpp"
#include "turboquant/cache/dequantize.hpp"

namespace turboquant::testing_support {

class DequantizeCase {
 public:
  DequantizeCase(AppendCase& layer, uint32_t seed) : layer_(layer), random_(seed) {
    const cache::PageTable& table = layer.table();
    int64_t longest = 0;
    for (int b = 0; b < table.batch_size(); ++b) longest = std::max(longest, table.length(b));
    page_columns = table.max_entries() + below(3);
    page_table = table.export_page_table(page_columns);
    for (int b = 0; b < table.batch_size(); ++b) {  // unused entries lead nowhere
      for (int64_t e = static_cast<int64_t>(table.entries(b).size()); e < page_columns; ++e) {
        page_table_poisoned.push_back((b * page_columns + e) * 2);
      }
    }
    rows = table.export_rows();
    past_tokens = longest + below(2) * below(90);
    const int64_t whole = below(3);
    first_position = whole == 0 ? 0 : below(past_tokens + 1);
    positions = whole == 0 ? past_tokens : below(past_tokens - first_position + 1);
    type = below(2) == 0 ? layer.type() : static_cast<cache::ElementType>(below(3));
    gaps = below(3) == 0;
  }

  // Runs the CPU and `run(*this, keys, values)` on output tensors of 0xFF bytes. Returns the first
  // difference, or nothing. NaN equals NaN, zeros are equal.
  template <class Run>
  std::string compare(Run run) {
    const cache::LayerSpec& spec = layer_.spec();
    const std::array<int64_t, 4> shape = {layer_.batch(), spec.num_kv_heads, positions,
                                          spec.head_dim};
    Tensor keys(type, shape, gaps), values(type, shape, gaps);
    Tensor tested_keys(type, shape, gaps), tested_values(type, shape, gaps);
    run_cpu(keys.view(), values.view());
    for (const int64_t entry : page_table_poisoned) {
      page_table[entry] = page_table[entry + 1] = INT32_MIN / 2;
    }
    run(*this, tested_keys, tested_values);
    const std::string difference = first_difference("key", keys, tested_keys);
    return difference.empty() ? first_difference("value", values, tested_values) : difference;
  }

  std::vector<int32_t> page_table, rows;
  int64_t page_columns = 0, past_tokens = 0, first_position = 0, positions = 0;
  cache::ElementType type{};
  bool gaps = false;

 private:
  int64_t below(int64_t end) { return static_cast<int64_t>(random_() % end); }

  void run_cpu(const cache::TensorView& keys, const cache::TensorView& values) {
    const AppendStorage& storage = layer_.storage();
    std::vector<std::byte> pages = storage.pages;
    std::vector<std::byte> exact_keys = storage.exact_keys, exact_values = storage.exact_values;
    const std::vector<std::byte*> slabs = layer_.slab_addresses(pages.data(), pages.size());
    cache::dequantize({.spec = layer_.spec(),
                       .exact_keys = layer_.exact_view(exact_keys.data()),
                       .exact_values = layer_.exact_view(exact_values.data()),
                       .smoothing = storage.smoothing.data(),
                       .pages = layer_.pages_view(slabs.data(), pages.size()),
                       .page_table = page_table,
                       .rows = rows,
                       .past_tokens = past_tokens,
                       .first_position = first_position,
                       .out_keys = keys,
                       .out_values = values},
                      serial());
  }

  // Bytes, gaps included; numbers where those differ.
  std::string first_difference(const char* what, const Tensor& expected, const Tensor& tested) {
    if (expected.bytes() == tested.bytes()) return "";
    const cache::LayerSpec& spec = layer_.spec();
    for (int64_t b = 0; b < layer_.batch(); ++b) {
      for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
        for (int64_t t = 0; t < positions; ++t) {
          const std::vector<float> a = expected.row(b, h, t), c = tested.row(b, h, t);
          for (int64_t i = 0; i < spec.head_dim; ++i) {
            if (std::isnan(a[i]) ? !std::isnan(c[i]) : a[i] != c[i]) {
              return std::string(what) + " of row " + std::to_string(b) + ", head " +
                     std::to_string(h) + ", position " + std::to_string(first_position + t) +
                     " of " + std::to_string(past_tokens) + ", channel " + std::to_string(i) +
                     ": " + std::to_string(c[i]) + " instead of " + std::to_string(a[i]);
            }
          }
        }
      }
    }
    // What differs now is a NaN's payload, a zero's sign, or bytes between the rows.
    if (gap_bytes_intact(tested)) return "";
    return std::string("bytes between rows of ") + what;
  }
  bool gap_bytes_intact(const Tensor& tested) const {
    std::vector<bool> inside(tested.bytes().size(), false);
    const cache::ConstTensorView view = tested.view();
    const int64_t bytes = cache::element_bytes(type);
    for (int64_t b = 0; b < view.shape[0]; ++b) {
      for (int64_t h = 0; h < view.shape[1]; ++h) {
        for (int64_t t = 0; t < view.shape[2]; ++t) {
          const int64_t at = view.row(b, h, t) - tested.bytes().data();
          for (int64_t i = 0; i < view.shape[3] * bytes; ++i) {
            inside[at + i / bytes * view.strides[3] * bytes + i % bytes] = true;
          }
        }
      }
    }
    for (size_t i = 0; i < inside.size(); ++i) {
      if (!inside[i] && tested.bytes()[i] != std::byte{0xFF}) return false;
    }
    return true;
  }

  AppendCase& layer_;
  std::mt19937 random_;
  std::vector<int64_t> page_table_poisoned;
};

}  // namespace turboquant::testing_support
