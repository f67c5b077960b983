// Device memory for tests, and what a test does on a machine without a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::testing_support {

inline void check_cuda(int status, const char* what) {
  if (status == cudaSuccess) return;
  throw CudaError(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

// Tests that launch kernels derive from this. Without a GPU they are skipped, each with the reason;
// TURBOQUANT_REQUIRE_GPU=1 turns that into a failure, so that a GPU machine cannot pass by
// skipping.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status == cudaSuccess && devices > 0) return;
    const std::string reason = std::string("NOT RUN: no usable GPU (") +
                               (status == cudaSuccess ? "no device" : cudaGetErrorString(status)) +
                               ")";
    const char* const required = std::getenv("TURBOQUANT_REQUIRE_GPU");
    if (required != nullptr && std::string_view(required) == "1") {
      FAIL() << reason << ", and TURBOQUANT_REQUIRE_GPU=1 asks for one";
    }
    GTEST_SKIP() << reason;
  }
};

// `count` elements of device memory between two guard zones. Everything starts as bytes of 0xFF:
// NaN in every float format, -1 as an integer.
template <class Element>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<Element>);

 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t count) : count_(count) {
    check_cuda(cudaMalloc(&memory_, allocated_bytes()), "cudaMalloc");
    check_cuda(cudaMemset(memory_, 0xFF, allocated_bytes()), "cudaMemset");
  }
  // A copy of host data.
  explicit DeviceBuffer(std::span<const Element> host)
      : DeviceBuffer(static_cast<int64_t>(host.size())) {
    upload(host);
  }
  explicit DeviceBuffer(const std::vector<Element>& host)
      : DeviceBuffer(std::span<const Element>(host)) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceBuffer() {
    if (memory_ != nullptr) cudaFree(memory_);
  }

  Element* data() const {
    return memory_ == nullptr
               ? nullptr
               : reinterpret_cast<Element*>(static_cast<std::byte*>(memory_) + kGuardBytes);
  }
  int64_t size() const { return count_; }

  void upload(std::span<const Element> host) {
    check_cuda(cudaMemcpy(data(), host.data(), host.size_bytes(), cudaMemcpyHostToDevice),
               "cudaMemcpy to the device");
  }
  // Waits for the device.
  std::vector<Element> download() const {
    std::vector<Element> host(count_);
    check_cuda(cudaMemcpy(host.data(), data(), count_ * sizeof(Element), cudaMemcpyDeviceToHost),
               "cudaMemcpy from the device");
    return host;
  }
  void poison() { check_cuda(cudaMemset(data(), 0xFF, count_ * sizeof(Element)), "cudaMemset"); }
  // Whether nothing was written outside the buffer, near it.
  bool guards_intact() const {
    std::vector<unsigned char> host(allocated_bytes());
    check_cuda(cudaMemcpy(host.data(), memory_, host.size(), cudaMemcpyDeviceToHost),
               "cudaMemcpy from the device");
    const size_t end = kGuardBytes + count_ * sizeof(Element);
    for (size_t i = 0; i < host.size(); ++i) {
      if ((i < kGuardBytes || i >= end) && host[i] != 0xFF) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuardBytes = 1024;
  size_t allocated_bytes() const { return count_ * sizeof(Element) + 2 * kGuardBytes; }

  void* memory_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace turboquant::testing_support
