// How the library's loops are spread over threads without the library owning a thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace turboquant {

// Runs body(begin, end) over disjoint ranges that cover [0, count). The caller supplies the
// threads: torch operators pass torch's pool, C++ callers `threads(n)`, tests `serial()`.
// Results never depend on how the ranges are cut.
using ParallelBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const ParallelBody& body)>;

inline ParallelFor serial() {
  return [](int64_t count, const ParallelBody& body) {
    if (count > 0) body(0, count);
  };
}

// Spreads the range over `num_threads` std::threads (0 = all hardware threads); the first
// exception thrown by a body is rethrown in the caller after every thread has ended.
inline ParallelFor threads(int num_threads = 0) {
  const int wanted = num_threads > 0
                         ? num_threads
                         : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return [wanted](int64_t count, const ParallelBody& body) {
    if (count <= 0) return;
    const int64_t parts = std::min<int64_t>(wanted, count);
    if (parts == 1) return body(0, count);
    std::exception_ptr failure;
    std::mutex failure_mutex;
    auto run = [&](int64_t part) {
      try {
        body(count * part / parts, count * (part + 1) / parts);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
      }
    };
    {
      std::vector<std::jthread> workers;
      workers.reserve(parts - 1);
      for (int64_t part = 1; part < parts; ++part) workers.emplace_back(run, part);
      run(0);
    }
    if (failure) std::rethrow_exception(failure);
  };
}

}  // namespace turboquant
