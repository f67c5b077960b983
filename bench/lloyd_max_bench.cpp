// Time to solve one codebook: arguments are dim (0: the Gaussian limit) and bits.
#include <benchmark/benchmark.h>

#include "turboquant/math/lloyd_max.hpp"

namespace turboquant::math {
namespace {

void BM_SolveLloydMax(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(0));
  const int bits = static_cast<int>(state.range(1));
  LloydMaxSolution solution;
  for (auto _ : state) {
    solution =
        dim == 0 ? solve_lloyd_max(Gaussian(), bits) : solve_lloyd_max(SphereMarginal(dim), bits);
    benchmark::DoNotOptimize(solution.levels.data());
  }
  state.counters["newton_steps"] = solution.iterations;
  state.counters["residual"] = solution.residual;
}

BENCHMARK(BM_SolveLloydMax)
    ->ArgNames({"dim", "bits"})
    ->ArgsProduct({{0, 2, 3, 64, 80, 128, 256, 4096, 1 << 20}, {1, 2, 4, 6, 8}})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace turboquant::math
