// The codec tables of a spec in host memory.
#pragma once

#include <vector>

#include "device_args.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cuda/codec_tables.hpp"

namespace turboquant::testing_support {

class HostTables {
 public:
  explicit HostTables(const cache::LayerSpec& spec)
      : spec_(spec), memory_(cuda::codec_tables_bytes(spec) / 16 + 1) {
    cuda::fill_codec_tables(cache::LayerCodec(spec),
                            {reinterpret_cast<std::byte*>(memory_.data()),
                             static_cast<size_t>(cuda::codec_tables_bytes(spec))});
  }
  cuda::CodecTables tables() const { return cuda::codec_tables_at(spec_, memory_.data()); }

 private:
  cache::LayerSpec spec_;
  std::vector<cuda::detail::Vector> memory_;
};

}  // namespace turboquant::testing_support
