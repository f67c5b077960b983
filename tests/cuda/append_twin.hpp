// A layer's storage on the device beside the same layer on the host.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "device_buffer.hpp"
#include "device_layer.hpp"
#include "turboquant/cache/layer_store.hpp"
#include "turboquant/cuda/dequantize.hpp"
#include "turboquant/cuda/encode_append.hpp"

namespace turboquant::testing_support {

// What a test needs of a layer on the host and its twin on the device.
class AppendTwin {
 public:
  AppendTwin(const cache::LayerSpec& spec, int batch, cache::ElementType type, int64_t pages)
      : spec_(spec),
        type_(type),
        store_(spec, batch, type, kPagesPerSlab),
        tables_(spec),
        exact_keys_(store_exact_bytes()),
        exact_values_(store_exact_bytes()),
        smoothing_(std::vector<float>(int64_t{batch} * spec.num_kv_heads * spec.head_dim, 1.0f)),
        counters_(std::vector<int64_t>{0, 0}) {
    const int64_t slab_bytes = kPagesPerSlab * page_bytes();
    std::vector<std::byte*> addresses;
    for (int64_t page = 0; page < pages; page += kPagesPerSlab) {
      slabs_.emplace_back(slab_bytes);
      addresses.push_back(slabs_.back().data());
    }
    addresses_ = DeviceBuffer<std::byte*>(addresses);
  }

  cuda::EncodeAppendParams params(const cache::TensorView& keys, const cache::TensorView& values,
                                  const int32_t* rows, const int32_t* jobs,
                                  int64_t num_jobs) const {
    const auto exact = [&](const DeviceBuffer<std::byte>& memory) {
      return cache::TensorView::contiguous(memory.data(), type_, store_.exact_keys().shape);
    };
    return {.spec = spec_,
            .tables = tables_.tables(),
            .key_states = keys,
            .value_states = values,
            .exact_keys = exact(exact_keys_),
            .exact_values = exact(exact_values_),
            .smoothing = smoothing_.data(),
            .pages = {.slabs = addresses_.data(),
                      .num_slabs = static_cast<int64_t>(slabs_.size()),
                      .pages_per_slab = kPagesPerSlab,
                      .page_bytes = page_bytes(),
                      .block_bytes = spec_.block_layout().block_bytes()},
            .rows = rows,
            .jobs = jobs,
            .num_jobs = num_jobs,
            .may_fit_smoothing = true,
            .counters = counters_.data()};
  }

  // Whether the host's committed tokens are the device's bytes.
  void expect_equal() const {
    std::vector<std::vector<std::byte>> slabs;
    for (const auto& slab : slabs_) slabs.push_back(slab.download());
    const std::vector<std::byte> keys = exact_keys_.download(), values = exact_values_.download();
    const cache::PageTable& table = store_.table();
    const cache::BlockLayout layout = spec_.block_layout();
    const int64_t row_bytes = spec_.head_dim * cache::element_bytes(type_);
    for (int b = 0; b < table.batch_size(); ++b) {
      for (const cache::PageEntry& entry : table.entries(b)) {
        ASSERT_EQ(entry.tokens, cache::kBlockTokens);
        const std::byte* const page =
            slabs[entry.page / kPagesPerSlab].data() + entry.page % kPagesPerSlab * page_bytes();
        for (int head = 0; head < spec_.num_kv_heads; ++head) {
          ASSERT_EQ(std::memcmp(page + head * layout.block_bytes(),
                                store_.pages().block(entry.page, head), layout.block_bytes()),
                    0)
              << "row " << b << ", page " << entry.page << ", head " << head;
        }
      }
      for (int64_t t = 0; t < table.length(b); ++t) {
        if (t >= spec_.sink_tokens && t < table.exact_begin(b)) continue;
        for (int head = 0; head < spec_.num_kv_heads; ++head) {
          const std::byte* const row =
              store_.exact_keys().row(b, head, spec_.exact_layout().slot(t));
          const int64_t at = row - static_cast<const std::byte*>(store_.exact_keys().data);
          ASSERT_EQ(std::memcmp(keys.data() + at, row, row_bytes), 0) << "token " << t;
          ASSERT_EQ(std::memcmp(values.data() + at,
                                static_cast<const std::byte*>(store_.exact_values().data) + at,
                                row_bytes),
                    0)
              << "token " << t;
        }
      }
    }
    const std::vector<float> smoothing = smoothing_.download();
    ASSERT_EQ(std::memcmp(smoothing.data(), store_.smoothing(), smoothing.size() * sizeof(float)),
              0);
  }

  // Whether both read the same numbers back, the device from its own pages.
  void expect_equal_numbers() const {
    const cache::PageTable& table = store_.table();
    int64_t longest = 0;
    for (int b = 0; b < table.batch_size(); ++b) longest = std::max(longest, table.length(b));
    const std::array<int64_t, 4> shape = {table.batch_size(), spec_.num_kv_heads, longest,
                                          spec_.head_dim};
    Tensor keys(type_, shape), values(type_, shape), read_keys(type_, shape),
        read_values(type_, shape);
    store_.dequantize(keys.view(), values.view(), threads());
    const DeviceTensor out_keys(read_keys), out_values(read_values);
    const DeviceBuffer<int32_t> entries(table.export_page_table(table.max_entries()));
    const DeviceBuffer<int32_t> rows(table.export_rows());
    const cuda::EncodeAppendParams own =
        params(out_keys.view(), out_values.view(), nullptr, nullptr, 0);
    check_cuda(cuda::dequantize({.spec = spec_,
                                 .tables = own.tables,
                                 .exact_keys = own.exact_keys,
                                 .exact_values = own.exact_values,
                                 .smoothing = own.smoothing,
                                 .pages = own.pages,
                                 .page_table = entries.data(),
                                 .page_columns = table.max_entries(),
                                 .rows = rows.data(),
                                 .past_tokens = longest,
                                 .out_keys = out_keys.view(),
                                 .out_values = out_values.view()},
                                nullptr),
               "dequantize");
    check_cuda(cudaDeviceSynchronize(), "dequantize");
    out_keys.download_to(read_keys);
    out_values.download_to(read_values);
    for (int b = 0; b < table.batch_size(); ++b) {
      for (int head = 0; head < spec_.num_kv_heads; ++head) {
        for (int64_t t = 0; t < longest; ++t) {  // zeros are equal
          ASSERT_EQ(read_keys.row(b, head, t), keys.row(b, head, t))
              << b << " " << head << " " << t;
          ASSERT_EQ(read_values.row(b, head, t), values.row(b, head, t))
              << b << " " << head << " " << t;
        }
      }
    }
  }

  cache::LayerStore& store() { return store_; }

 private:
  static constexpr int64_t kPagesPerSlab = 5;
  int64_t page_bytes() const { return spec_.block_layout().page_bytes(spec_.num_kv_heads); }
  int64_t store_exact_bytes() const {
    const auto& shape = store_.exact_keys().shape;
    return shape[0] * shape[1] * shape[2] * shape[3] * cache::element_bytes(type_);
  }

  cache::LayerSpec spec_;
  cache::ElementType type_;
  cache::LayerStore store_;
  DeviceTables tables_;
  DeviceBuffer<std::byte> exact_keys_, exact_values_;
  DeviceBuffer<float> smoothing_;
  DeviceBuffer<int64_t> counters_;
  std::vector<DeviceBuffer<std::byte>> slabs_;
  DeviceBuffer<std::byte*> addresses_;
};

}  // namespace turboquant::testing_support
