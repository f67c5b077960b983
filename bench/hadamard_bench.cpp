// Hadamard transforms of rows: time per call and per element, one row and 16 interleaved rows.
#include <benchmark/benchmark.h>

#include <vector>

#include "turboquant/math/hadamard.hpp"

namespace turboquant::math {
namespace {

void BM_Hadamard(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(0));
  const int64_t lanes = state.range(1);
  std::vector<float> x(dim * lanes, 1.0f);
  for (auto _ : state) {
    detail::hadamard_kernel<PortableIsa, false>(x.data(), dim, lanes);
    benchmark::DoNotOptimize(x.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * dim * lanes);
}

BENCHMARK(BM_Hadamard)->ArgNames({"dim", "lanes"})->ArgsProduct({{64, 80, 96, 128, 256}, {1, 16}});

}  // namespace
}  // namespace turboquant::math
