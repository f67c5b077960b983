#include <cuda_runtime_api.h>

#include <algorithm>

#include "turboquant/cuda/slab_addresses.hpp"

namespace turboquant::cuda {
namespace {

struct Addresses {
  std::byte* slab[kSlabAddressesPerLaunch];
};

// grid 1, a thread for every address.
__global__ void __launch_bounds__(kSlabAddressesPerLaunch)
    write_addresses(const __grid_constant__ Addresses addresses, int count, std::byte** to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = addresses.slab[i];
}

}  // namespace

int write_slab_addresses(std::byte* const* slabs, int64_t count, std::byte** to,
                         cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kSlabAddressesPerLaunch) {
    const int here = static_cast<int>(std::min<int64_t>(kSlabAddressesPerLaunch, count - first));
    Addresses addresses;
    std::copy_n(slabs + first, here, addresses.slab);
    const int threads = (here + 31) / 32 * 32;
    write_addresses<<<1, threads, 0, stream>>>(addresses, here, to + first);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace turboquant::cuda
