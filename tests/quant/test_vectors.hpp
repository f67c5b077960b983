// Random vectors for the statistical tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>
#include <vector>

#include "turboquant/parallel.hpp"

namespace turboquant::quant {

// n uniformly random unit vectors in R^d, [n, d]; the same for any number of threads.
inline std::vector<float> random_unit_vectors(int64_t n, int dim, uint64_t seed) {
  std::vector<float> vectors(n * dim);
  threads()((n + 255) / 256, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      std::mt19937_64 generator(seed * 1000003 + block);
      std::normal_distribution<double> normal;
      std::vector<double> row(dim);
      for (int64_t r = block * 256; r < std::min(n, block * 256 + 256); ++r) {
        double squares = 0.0;
        for (double& value : row) {
          value = normal(generator);
          squares += value * value;
        }
        for (int i = 0; i < dim; ++i) {
          vectors[r * dim + i] = static_cast<float>(row[i] / std::sqrt(squares));
        }
      }
    }
  });
  return vectors;
}

}  // namespace turboquant::quant
