// Owning tensors for tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "turboquant/cache/tensor_view.hpp"

namespace turboquant::testing_support {

// [B, H, T, D] of any element type. Dense, or with every stride larger than needed and the gaps
// full of NaN.
class Tensor {
 public:
  Tensor(cache::ElementType type, const std::array<int64_t, 4>& shape, bool gaps = false)
      : view_(cache::TensorView::contiguous(nullptr, type, shape)) {
    if (gaps) {
      view_.strides[3] = 2;
      view_.strides[2] = 2 * shape[3] + 3;
      view_.strides[1] = shape[2] * view_.strides[2] + 1;
      view_.strides[0] = shape[1] * view_.strides[1] + 5;
    }
    bytes_.assign((shape[0] * view_.strides[0] + 1) * cache::element_bytes(type), std::byte{0xFF});
  }
  static Tensor random(cache::ElementType type, const std::array<int64_t, 4>& shape, uint32_t seed,
                       float offset = 0.0f, bool gaps = false) {
    Tensor tensor(type, shape, gaps);
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    // A fixed offset per channel gives keys a mean, as rotary embeddings and biases do.
    std::vector<float> channel(shape[3]);
    for (float& c : channel) c = offset * normal(generator);
    std::vector<float> row(shape[3]);
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t t = 0; t < shape[2]; ++t) {
          for (int64_t i = 0; i < shape[3]; ++i) row[i] = normal(generator) + channel[i];
          cache::store_row(tensor.view(), b, h, t, row.data());
        }
      }
    }
    return tensor;
  }

  cache::TensorView view() {
    cache::TensorView view = view_;
    view.data = bytes_.data();
    return view;
  }
  cache::ConstTensorView view() const {
    return {bytes_.data(), view_.type, view_.shape, view_.strides};
  }
  // Tokens [begin, end).
  cache::ConstTensorView tokens(int64_t begin, int64_t end) const {
    cache::ConstTensorView part = view();
    part.data = part.row(0, 0, begin);
    part.shape[2] = end - begin;
    return part;
  }
  // Row b alone.
  cache::ConstTensorView batch_row(int64_t b) const {
    cache::ConstTensorView part = view();
    part.data = part.row(b, 0, 0);
    part.shape[0] = 1;
    return part;
  }

  std::vector<float> row(int64_t b, int64_t h, int64_t t) const {
    std::vector<float> values(view_.shape[3]);
    cache::load_row(view(), b, h, t, values.data());
    return values;
  }
  void set_row(int64_t b, int64_t h, int64_t t, const std::vector<float>& values) {
    cache::store_row(view(), b, h, t, values.data());
  }
  void fill_row(int64_t b, int64_t h, int64_t t, float value) {
    set_row(b, h, t, std::vector<float>(view_.shape[3], value));
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  cache::TensorView view_;  // without data: bytes_ may move
  std::vector<std::byte> bytes_;
};

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace turboquant::testing_support
