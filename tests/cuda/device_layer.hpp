// A layer's tables, storage and tensors on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "../support/append_cases.hpp"
#include "../support/tensor.hpp"
#include "device_buffer.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cuda/codec_tables.hpp"

namespace turboquant::testing_support {

class DeviceTables {
 public:
  explicit DeviceTables(const cache::LayerSpec& spec) : spec_(spec) {
    std::vector<std::byte> host(cuda::codec_tables_bytes(spec));
    cuda::fill_codec_tables(cache::LayerCodec(spec), host);
    memory_ = DeviceBuffer<std::byte>(host);
  }
  cuda::CodecTables tables() const { return cuda::codec_tables_at(spec_, memory_.data()); }

 private:
  cache::LayerSpec spec_;
  DeviceBuffer<std::byte> memory_;
};

// A copy of a tensor, gaps included.
class DeviceTensor {
 public:
  explicit DeviceTensor(const Tensor& tensor) : view_(tensor.view()), memory_(tensor.bytes()) {}

  cache::TensorView view() const {
    return {memory_.data(), view_.type, view_.shape, view_.strides};
  }
  void download_to(Tensor& tensor) const {
    const std::vector<std::byte> host = memory_.download();
    std::memcpy(tensor.view().data, host.data(), host.size());
  }
  bool guards_intact() const { return memory_.guards_intact(); }

 private:
  cache::ConstTensorView view_;
  DeviceBuffer<std::byte> memory_;
};

// A copy of an append's storage. Buffers that the layer does not have stay empty.
class DeviceStorage {
 public:
  DeviceStorage(const AppendCase& layer, const AppendStorage& host)
      : layer_(layer),
        exact_keys_(host.exact_keys),
        exact_values_(host.exact_values),
        pages_(host.pages),
        smoothing_(host.smoothing),
        counters_(std::span<const int64_t>(host.counters)),
        slabs_(layer.slab_addresses(pages_.data(), host.pages.size())) {}

  cache::TensorView exact_keys() const { return layer_.exact_view(exact_keys_.data()); }
  cache::TensorView exact_values() const { return layer_.exact_view(exact_values_.data()); }
  cache::PagePoolView pages() const {
    return layer_.pages_view(slabs_.data(), static_cast<size_t>(pages_.size()));
  }
  float* smoothing() const { return smoothing_.data(); }
  int64_t* counters() const { return counters_.data(); }

  void download_to(AppendStorage& host) const {
    host.exact_keys = exact_keys_.download();
    host.exact_values = exact_values_.download();
    host.pages = pages_.download();
    host.smoothing = smoothing_.download();
    std::ranges::copy(counters_.download(), host.counters.begin());
  }
  bool guards_intact() const {
    return exact_keys_.guards_intact() && exact_values_.guards_intact() && pages_.guards_intact() &&
           smoothing_.guards_intact() && counters_.guards_intact();
  }

 private:
  const AppendCase& layer_;
  DeviceBuffer<std::byte> exact_keys_, exact_values_, pages_;
  DeviceBuffer<float> smoothing_;
  DeviceBuffer<int64_t> counters_;
  DeviceBuffer<std::byte*> slabs_;
};

}  // namespace turboquant::testing_support
