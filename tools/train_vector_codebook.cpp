// Trains the vector codebooks that src/math/vector_codebook_levels.inc holds and prints that file:
//
//   cmake --preset release && cmake --build --preset release --target train_vector_codebook
//   build/release/train_vector_codebook > src/math/vector_codebook_levels.inc
//
// Lloyd's iteration (Linde, Buzo and Gray, 1980) with the library's own encoder as the nearest
// codeword: every level becomes the mean of the coordinates that were coded with it, over fresh
// rows of 4096 normal coordinates. Noise on the levels that fades out (stochastic relaxation,
// Zeger, Vaisey and Gersho, 1992) keeps it from the first local optimum; the best of a few starts
// is refined on more rows, rounded to multiples of 2^-5, and measured on rows it has not seen.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/quantize_rows.hpp"

namespace turboquant {
namespace {

using math::VectorCodebook;

constexpr int kDim = 4096;  // a normalised row of so many is normal to 1 part in 4096
constexpr int kValues = 2 * VectorCodebook::kEntries;
using Levels = std::vector<float>;  // [256, 2]

constexpr int kStarts = 6;
constexpr int kIterations = 160, kRows = 320;  // of a start
constexpr int kRefinements = 12, kRefinementRows = 3200;
constexpr int kMeasuredRows = 8000;

// What coding num_rows fresh rows shows.
struct Statistics {
  std::array<double, kValues> sums{};
  std::array<int64_t, VectorCodebook::kEntries> counts{};
  double distortion = 0.0;  // per coordinate
};

Statistics code_rows(int bits, const Levels& levels, int num_rows, std::mt19937_64& random) {
  const VectorCodebook codebook(bits, levels);
  std::normal_distribution<float> normal;
  const int64_t row_bytes = quant::packed_row_bytes(kDim, bits);
  std::vector<float> row(kDim);
  std::vector<uint8_t> packed(row_bytes);
  Statistics found;
  for (int r = 0; r < num_rows;) {
    constexpr int kTogether = 16;  // rows of a tile of the encoder
    const int rows = std::min(kTogether, num_rows - r);
    row.resize(int64_t{rows} * kDim);
    packed.resize(rows * row_bytes);
    for (float& x : row) x = normal(random);
    std::array<float, kTogether> scales{};
    quant::quantize_rows({.dim = kDim,
                          .bits = bits,
                          .levels = {},
                          .boundaries = {},
                          .rule = quant::ScaleRule::kNorm,
                          .rows = row.data(),
                          .row_stride_elems = kDim,
                          .num_rows = rows,
                          .codes = packed.data(),
                          .codes_stride_bytes = row_bytes,
                          .scales = scales.data(),
                          .vector_codebook = &codebook});
    for (int k = 0; k < rows; ++k) {
      for (int p = 0; p < kDim / 2; ++p) {
        const int entry = quant::pair_index(packed.data() + k * row_bytes, kDim, bits, p);
        ++found.counts[entry];
        for (int i = 0; i < 2; ++i) {
          const double x = row[int64_t{k} * kDim + 2 * p + i] / scales[k];
          const double error = x - levels[2 * entry + i];
          found.sums[2 * entry + i] += x;
          found.distortion += error * error;
        }
      }
    }
    r += rows;
  }
  found.distortion /= static_cast<double>(num_rows) * kDim;
  return found;
}

// One step of Lloyd's iteration; codewords that nothing was coded with start anew.
void move_to_centroids(const Statistics& found, double noise, std::mt19937_64& random,
                       Levels& levels) {
  std::normal_distribution<double> normal;
  for (int v = 0; v < kValues; ++v) {
    const int64_t count = found.counts[v / 2];
    const double mean = count > 0 ? found.sums[v] / static_cast<double>(count) : normal(random);
    levels[v] = static_cast<float>(mean + noise * normal(random));
  }
}

Levels train(int bits) {
  constexpr double kNoise = 0.5;       // at first, in units of the root of the distortion
  constexpr double kNoisyPart = 0.75;  // of a start's iterations
  Levels best;
  double least = INFINITY;
  for (int start = 0; start < kStarts; ++start) {
    std::mt19937_64 random(1000 * bits + start);
    std::normal_distribution<float> normal;
    Levels levels(kValues);
    for (float& level : levels) level = normal(random);
    double distortion = 1.0;
    for (int i = 0; i < kIterations; ++i) {
      const Statistics found = code_rows(bits, levels, kRows, random);
      distortion = found.distortion;
      const double left = std::max(0.0, 1.0 - i / (kNoisyPart * kIterations));
      move_to_centroids(found, kNoise * left * left * std::sqrt(distortion), random, levels);
    }
    std::fprintf(stderr, "%d bits, start %d: %.6f\n", bits, start, distortion);
    if (distortion < least) {
      least = distortion;
      best = levels;
    }
  }
  std::mt19937_64 random(1000 * bits + kStarts);
  for (int i = 0; i < kRefinements; ++i) {
    move_to_centroids(code_rows(bits, best, kRefinementRows, random), 0.0, random, best);
  }
  return best;
}

void print(int bits) {
  constexpr float kUnits = 1.0f / VectorCodebook::kUnit;
  Levels levels = train(bits);
  for (float& level : levels) level = std::round(level * kUnits) / kUnits;
  std::mt19937_64 random(1000 * bits + kStarts + 1);
  const double distortion = code_rows(bits, levels, kMeasuredRows, random).distortion;
  std::fprintf(stderr, "%d bits: %.6f\n", bits, distortion);
  std::printf("constexpr double kDistortion%d = %.6f;\n", bits, distortion);
  std::printf("constexpr int8_t kLevels%d[%d] = {", bits, kValues);
  for (int v = 0; v < kValues; ++v) {
    std::printf("%s%d,", v % 16 == 0 ? "\n    " : " ", static_cast<int>(levels[v] * kUnits));
  }
  std::printf("\n};\n");
}

}  // namespace
}  // namespace turboquant

int main() {
  std::printf(
      "// Written by tools/train_vector_codebook.cpp: levels [256, 2] in units of 2^-5, and the\n"
      "// mean squared error of a normal coordinate.\n");
  for (int bits = turboquant::math::VectorCodebook::kMinBits;
       bits <= turboquant::math::VectorCodebook::kMaxBits; ++bits) {
    turboquant::print(bits);
  }
}
