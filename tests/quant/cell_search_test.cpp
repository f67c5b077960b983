#include "turboquant/quant/cell_search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "turboquant/math/codebook.hpp"

namespace turboquant::quant {
namespace {

uint32_t code_of(const CellSearch& search, float x) {
  return search_code(
      search.cells[search_cell(x, search.scale, static_cast<int>(search.cells.size()))], x);
}

// Every head_dim that the CUDA encoder takes, every width: the count of boundaries below x, at the
// boundaries, beside them, far outside and anywhere.
TEST(CellSearch, CountsTheBoundariesBelow) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (const int dim : {8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256}) {
    for (int bits = 1; bits <= 8; ++bits) {
      const auto boundaries = math::Codebook::sphere(dim, bits).boundaries();
      const CellSearch search = make_cell_search(bits, boundaries);
      const auto expect_count = [&](float x) {
        const auto count =
            std::count_if(boundaries.begin(), boundaries.end(), [&](float b) { return b < x; });
        ASSERT_EQ(code_of(search, x), count) << dim << " " << bits << " " << x;
      };
      for (const float b : boundaries) {
        expect_count(b);
        expect_count(std::nextafter(b, INFINITY));
        expect_count(std::nextafter(b, -INFINITY));
      }
      for (int i = 0; i < 2000; ++i) expect_count(normal(generator));
      for (const float x : {0.0f, -0.0f, 1e-45f, -1e-45f, 100.0f, -100.0f, 3e38f, -3e38f}) {
        expect_count(x);
      }
      expect_count(-INFINITY);
    }
  }
}

// Few bits: the codes before a cell are its index, which the encoder relies on.
TEST(CellSearch, CellsOfFewBitsAreBoundaries) {
  for (int bits = 1; bits <= kIndexedCellBits; ++bits) {
    const auto boundaries = math::Codebook::sphere(128, bits).boundaries();
    const CellSearch search = make_cell_search(bits, boundaries);
    ASSERT_EQ(search.cells.size(), boundaries.size());
    for (size_t k = 0; k < boundaries.size(); ++k) {
      EXPECT_EQ(search.cells[k].boundary, boundaries[k]);
      EXPECT_EQ(search.cells[k].code, k);
    }
  }
}

TEST(CellSearch, RefusesBoundariesThatShareACell) {
  const std::vector<float> few = {-3.0f, -2.0f, -1.0f, 0.0f, 0.1f, 2.0f, 3.0f};
  EXPECT_THROW(make_cell_search(3, few), InvalidArgument);
  const std::vector<float> many = {-4.0f, 0.0f, 0.01f};
  EXPECT_THROW(make_cell_search(5, many), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::quant
