// The encode kernels on the host: every thread of every block takes each step in turn, so that what
// a GPU will compute (arithmetic, addresses, shared memory, order of steps) is tested without one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../support/append_cases.hpp"
#include "device_args.hpp"
#include "turboquant/cuda/encode_append.hpp"

namespace turboquant::testing_support {

// A block's shared memory, full of NaN and ones; before it, what threads exchange by shuffles.
class SharedMemory {
 public:
  explicit SharedMemory(int bytes, int exchanged_bytes = 0)
      : exchanged_(exchanged_bytes / 16), storage_(exchanged_ + bytes / 16 + 1) {
    std::memset(storage_.data(), 0xFF, storage_.size() * 16);
  }
  std::byte* data() { return reinterpret_cast<std::byte*>(storage_.data() + exchanged_); }

 private:
  size_t exchanged_;
  std::vector<cuda::detail::Vector> storage_;
};

// Runs a step for every thread of a block, in either order: within a step no thread may depend on
// another.
template <class Thread>
auto each_of(std::vector<Thread>& threads, bool backwards) {
  return [&threads, backwards](auto step) {
    if (backwards) {
      std::for_each(threads.rbegin(), threads.rend(), step);
    } else {
      std::for_each(threads.begin(), threads.end(), step);
    }
  };
}

// Copies of 16 bytes as they are asked for.
struct HostCopies {
  static void copy16(std::byte* to, const std::byte* from) { std::memcpy(to, from, 16); }
  static void commit() {}
  static void wait() {}
};

// Runs an append in host memory, blocks of up to max_jobs jobs each. Not inline: the kernels of all
// head dims take the compiler a minute.
void emulate_encode_append(const cuda::EncodeAppendParams& params, bool backwards,
                           int max_jobs = 1);

// The parameters of a case's append, all in host memory. Jobs and rows are the chunk's until
// changed.
inline cuda::EncodeAppendParams host_params(const AppendCase& c, const AppendCase::Chunk& chunk,
                                            AppendStorage& storage, const cuda::CodecTables& tables,
                                            const std::vector<std::byte*>& slabs) {
  return {.spec = c.spec(),
          .tables = tables,
          .key_states = chunk.keys.view(),
          .value_states = chunk.values.view(),
          .exact_keys = c.exact_view(storage.exact_keys.data()),
          .exact_values = c.exact_view(storage.exact_values.data()),
          .smoothing = storage.smoothing.data(),
          .pages = c.pages_view(slabs.data(), storage.pages.size()),
          .rows = chunk.rows.data(),
          .jobs = chunk.jobs.data(),
          .num_jobs = chunk.num_jobs(),
          .counters = storage.counters.data()};
}

}  // namespace turboquant::testing_support
