// Coordinates per second of the quantisers on one core: encode (rotate, quantise, pack), its two
// halves, decode and score, per width, dimension and SIMD level.
//   turboquant_bench --benchmark_filter=Encode
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "turboquant/math/codebook.hpp"
#include "turboquant/quant/mse.hpp"
#include "turboquant/quant/prod.hpp"
#include "turboquant/quant/quantize_rows.hpp"
#include "turboquant/quant/rotation.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::quant {
namespace {

constexpr int64_t kRows = 1024;

std::vector<float> random_rows(int64_t count) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& value : rows) value = normal(generator);
  return rows;
}

void report_coordinates(benchmark::State& state, int64_t per_iteration) {
  state.counters["coordinates"] = benchmark::Counter(static_cast<double>(per_iteration),
                                                     benchmark::Counter::kIsIterationInvariantRate);
}

struct EncodedBatch {
  explicit EncodedBatch(const TurboQuantMse& quantizer)
      : vectors(random_rows(kRows * quantizer.dim())),
        codes(kRows * quantizer.row_bytes()),
        scales(kRows) {
    quantizer.encode(vectors, codes, scales, serial());
  }
  std::vector<float> vectors;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
};

// Arguments: SIMD level, dim, bits.
bool use_level(benchmark::State& state) {
  const auto level = static_cast<SimdLevel>(state.range(0));
  state.SetLabel(std::string(simd_level_name(level)));
  for (const SimdLevel available : available_simd_levels()) {
    if (available == level) {
      set_simd_level(level);
      return true;
    }
  }
  state.SkipWithError("not available on this machine");
  return false;
}

void Encode(benchmark::State& state) {
  if (!use_level(state)) return;
  const TurboQuantMse quantizer(static_cast<int>(state.range(1)), static_cast<int>(state.range(2)),
                                42, ScaleRule::kUnbiased);
  EncodedBatch batch(quantizer);
  for (auto _ : state) {
    quantizer.encode(batch.vectors, batch.codes, batch.scales, serial());
    benchmark::ClobberMemory();
  }
  report_coordinates(state, kRows * quantizer.dim());
}
BENCHMARK(Encode)
    ->ArgNames({"simd", "dim", "bits"})
    ->ArgsProduct({{0, 1, 2}, {128}, {1, 2, 3, 4, 5, 6, 7, 8}})
    ->ArgsProduct({{2}, {64, 80, 96, 256}, {4}});

void Rotate(benchmark::State& state) {
  if (!use_level(state)) return;
  const auto dim = static_cast<int>(state.range(1));
  const int64_t num_rows = state.range(2);
  const SignHadamardRotation rotation(dim, 42, 0);
  std::vector<float> rows = random_rows(num_rows * dim);
  for (auto _ : state) {
    rotation.apply(rows.data(), num_rows);
    benchmark::ClobberMemory();
  }
  report_coordinates(state, num_rows * dim);
}
BENCHMARK(Rotate)
    ->ArgNames({"simd", "dim", "rows"})
    ->ArgsProduct({{0, 1, 2}, {128}, {1, 4, 8, 64}})
    ->ArgsProduct({{2}, {64, 80, 96, 256}, {64}});

void QuantizeRows(benchmark::State& state) {
  if (!use_level(state)) return;
  const auto dim = static_cast<int>(state.range(1));
  const auto bits = static_cast<int>(state.range(2));
  const int64_t num_rows = 64;
  const math::Codebook& codebook = math::Codebook::sphere(dim, bits);
  const std::vector<float> rows = random_rows(num_rows * dim);
  std::vector<uint8_t> codes(num_rows * packed_row_bytes(dim, bits));
  std::vector<float> scales(num_rows);
  for (auto _ : state) {
    quantize_rows({dim, bits, codebook.levels(), codebook.boundaries(), ScaleRule::kUnbiased,
                   rows.data(), dim, num_rows, codes.data(), packed_row_bytes(dim, bits),
                   scales.data()});
    benchmark::ClobberMemory();
  }
  report_coordinates(state, num_rows * dim);
}
BENCHMARK(QuantizeRows)
    ->ArgNames({"simd", "dim", "bits"})
    ->ArgsProduct({{0, 1, 2}, {128}, {2, 3, 4, 5, 8}});

void DecodeRow(benchmark::State& state) {  // table look-ups alone: no scale, no rotation
  const TurboQuantMse quantizer(128, static_cast<int>(state.range(0)));
  const EncodedBatch batch(quantizer);
  std::vector<float> row(quantizer.dim());
  for (auto _ : state) {
    for (int64_t r = 0; r < kRows; ++r) {
      decode_row(quantizer.decode_table(), batch.codes.data() + r * quantizer.row_bytes(),
                 quantizer.dim(), row.data());
      benchmark::DoNotOptimize(row.data());
      benchmark::ClobberMemory();
    }
  }
  report_coordinates(state, kRows * quantizer.dim());
}
BENCHMARK(DecodeRow)->ArgName("bits")->DenseRange(1, 8);

void Decode(benchmark::State& state) {
  const TurboQuantMse quantizer(128, static_cast<int>(state.range(0)));
  EncodedBatch batch(quantizer);
  for (auto _ : state) {
    quantizer.decode(batch.codes, batch.scales, batch.vectors, serial());
    benchmark::ClobberMemory();
  }
  report_coordinates(state, kRows * quantizer.dim());
}
BENCHMARK(Decode)->ArgName("bits")->DenseRange(1, 8);

void Score(benchmark::State& state) {
  const TurboQuantMse quantizer(128, static_cast<int>(state.range(0)));
  const EncodedBatch batch(quantizer);
  const std::vector<float> query = random_rows(quantizer.dim());
  std::vector<float> scores(kRows);
  for (auto _ : state) {
    quantizer.score(query, batch.codes, batch.scales, scores, serial());
    benchmark::ClobberMemory();
  }
  report_coordinates(state, kRows * quantizer.dim());
}
BENCHMARK(Score)->ArgName("bits")->DenseRange(1, 8);

void ProdEncode(benchmark::State& state) {
  const TurboQuantProd quantizer(128, 4, 42, static_cast<Projection>(state.range(0)));
  const std::vector<float> vectors = random_rows(kRows * quantizer.dim());
  std::vector<uint8_t> rows(kRows * quantizer.row_bytes());
  std::vector<float> scales(kRows), residual_norms(kRows);
  for (auto _ : state) {
    quantizer.encode(vectors, rows, scales, residual_norms, serial());
    benchmark::ClobberMemory();
  }
  state.SetLabel(std::string(projection_name(quantizer.projection())));
  report_coordinates(state, kRows * quantizer.dim());
}
BENCHMARK(ProdEncode)->ArgName("projection")->DenseRange(0, 1);

}  // namespace
}  // namespace turboquant::quant
