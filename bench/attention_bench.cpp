// Decode attention over packed codes, encoding and dequantising of one layer on the CPU.
// TURBOQUANT_SIMD=portable|avx2|avx512|avx512vnni chooses the level. "codes" counts key and value
// coordinates read once each, whatever the number of query heads; "bytes" what the layer's pages
// hold.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "turboquant/cache/layer_store.hpp"

namespace turboquant {
namespace {

using cache::ElementType;
using cache::TensorView;

constexpr int kHeads = 8, kGroup = 4, kDim = 128;

std::vector<float> normal_numbers(int64_t count) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = normal(generator);
  return numbers;
}

cache::LayerSpec spec_of(int bits, bool vectors) {
  cache::LayerSpec spec{.head_dim = kDim, .num_kv_heads = kHeads, .k_bits = bits, .v_bits = bits};
  if (vectors) spec.codebook = quant::CodebookKind::kVector;
  return spec;
}

TensorView view(std::vector<float>& numbers, int64_t heads, int64_t tokens) {
  return TensorView::contiguous(numbers.data(), ElementType::kFloat32, {1, heads, tokens, kDim});
}

void append(cache::LayerStore& store, std::vector<float>& numbers, int64_t tokens) {
  const TensorView chunk = view(numbers, kHeads, tokens);
  store.append(chunk, chunk, {}, threads());
}

void count(benchmark::State& state, int64_t tokens, int64_t bytes) {
  const double codes = 2.0 * kHeads * kDim * static_cast<double>(tokens);
  state.counters["codes"] =
      benchmark::Counter(codes, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bytes"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

void DecodeAttention(benchmark::State& state) {
  const auto bits = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1), queries = state.range(2);
  cache::LayerStore store(spec_of(bits, state.range(4) == 1), 1, ElementType::kFloat32);
  std::vector<float> numbers = normal_numbers(kHeads * tokens * kDim);
  append(store, numbers, tokens);
  std::vector<float> out(kHeads * kGroup * queries * kDim);
  const auto one_thread = serial();
  for (auto _ : state) {
    store.attend({.query = view(numbers, kHeads * kGroup, queries),
                  .key_states = {},
                  .value_states = {},
                  .scaling = 1.0f / std::sqrt(float{kDim}),
                  .out = view(out, kHeads * kGroup, queries)},
                 state.range(3) == 1 ? one_thread : threads());
    benchmark::DoNotOptimize(out.data());
  }
  count(state, tokens, store.memory().used_pages_bytes);
}
BENCHMARK(DecodeAttention)
    ->ArgNames({"bits", "tokens", "queries", "threads", "vector"})
    ->ArgsProduct({{2, 3, 4, 5, 8}, {8192}, {1}, {1}, {0}})
    ->ArgsProduct({{2, 3, 4}, {8192}, {1}, {1}, {1}})
    ->ArgsProduct({{4}, {1024, 65536}, {1}, {1}, {0}})
    ->ArgsProduct({{4}, {8192}, {16}, {1}, {0, 1}})
    ->ArgsProduct({{4}, {65536}, {1}, {0}, {0}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

void EncodeAppend(benchmark::State& state) {
  const auto bits = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  std::vector<float> numbers = normal_numbers(kHeads * tokens * kDim);
  cache::LayerStore store(spec_of(bits, state.range(2) == 1), 1, ElementType::kFloat32);
  const TensorView chunk = view(numbers, kHeads, tokens);
  for (auto _ : state) {
    store.append(chunk, chunk, {}, serial());
    state.PauseTiming();
    store.reset();
    state.ResumeTiming();
  }
  count(state, tokens, 0);
}
BENCHMARK(EncodeAppend)
    ->ArgNames({"bits", "tokens", "vector"})
    ->ArgsProduct({{2, 3, 4}, {2048}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);

void Dequantize(benchmark::State& state) {
  const auto bits = static_cast<int>(state.range(0));
  const int64_t tokens = state.range(1);
  cache::LayerStore store(spec_of(bits, state.range(2) == 1), 1, ElementType::kFloat32);
  std::vector<float> numbers = normal_numbers(kHeads * tokens * kDim);
  append(store, numbers, tokens);
  std::vector<float> values(numbers.size());
  for (auto _ : state) {
    store.dequantize(view(numbers, kHeads, tokens), view(values, kHeads, tokens), serial());
    benchmark::DoNotOptimize(values.data());
  }
  count(state, tokens, store.memory().used_pages_bytes);
}
BENCHMARK(Dequantize)
    ->ArgNames({"bits", "tokens", "vector"})
    ->ArgsProduct({{2, 3, 4}, {2048}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace turboquant
