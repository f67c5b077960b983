#include "turboquant/cuda/slab_addresses.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device_buffer.hpp"

namespace turboquant::testing_support {
namespace {

class SlabAddresses : public GpuTest {};

TEST_F(SlabAddresses, ArriveWhateverTheirNumber) {
  for (const int64_t count :
       {0, 1, 33, cuda::kSlabAddressesPerLaunch, cuda::kSlabAddressesPerLaunch + 1, 1000}) {
    std::vector<std::byte*> slabs(count);
    for (int64_t i = 0; i < count; ++i) {
      slabs[i] = reinterpret_cast<std::byte*>(uintptr_t{0x7f0000000000} + 4096 * i);
    }
    DeviceBuffer<std::byte*> device(count);
    check_cuda(cuda::write_slab_addresses(slabs.data(), count, device.data(), nullptr),
               "write_slab_addresses");
    // The parameters are the launch's own.
    const std::vector<std::byte*> expected = slabs;
    slabs.assign(count, nullptr);
    EXPECT_EQ(device.download(), expected) << count;
    EXPECT_TRUE(device.guards_intact()) << count;
  }
}

}  // namespace
}  // namespace turboquant::testing_support
