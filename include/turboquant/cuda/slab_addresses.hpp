// The device array of slab addresses that PagePoolView points to, written from host memory.
#pragma once

#include <cstddef>
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace turboquant::cuda {

// Enqueues writes of slabs[0, count) (host memory, read before the return) to `to` (device memory)
// and returns a cudaError_t (0: enqueued). The addresses travel as kernel parameters: nothing on
// the host has to outlive the call, and a graph that captures it keeps them. One launch for every
// kSlabAddressesPerLaunch addresses; neither allocates nor synchronises.
inline constexpr int kSlabAddressesPerLaunch = 480;  // of the 4 KB that every device takes
int write_slab_addresses(std::byte* const* slabs, int64_t count, std::byte** to,
                         cudaStream_t stream);

}  // namespace turboquant::cuda
