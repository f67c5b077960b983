// combine_splits, run on the CPU (simt_emulator.hpp), on partial results made up for it: as many as
// no emulated attention would have.
#define TQ_SIMT_EMULATOR "../tests/kernels/simt_emulator.hpp"
#include "../../kernels/decode_attention_combine.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace turboquant::cuda {
namespace {

constexpr int kRows = 3;  // query heads of the only KV head
constexpr int kSinks = 4;

struct Combined {
  std::vector<float> out, lse;
};

// The partial results of `splits` page splits, of which every seventh has seen no token, and of a
// piece of exact tokens. Maxima differ, and outputs are such that pages and exact tokens give half
// of the combined output each, and always the same.
template <int kDim>
class Partials {
 public:
  explicit Partials(int splits) : slots_(splits + 1) {
    constexpr auto kNaN = std::numeric_limits<float>::quiet_NaN();
    std::mt19937 random(splits);
    std::uniform_real_distribution<float> max(-20.0f, 20.0f), sum(1.0f, 64.0f);
    floats_.assign(slots_ * detail::partial_floats(kDim), kNaN);
    double weights[kRows][2] = {};
    std::vector<float> maxima(size_t(slots_) * kRows), sums(maxima.size());
    for (int s = 0; s < slots_; ++s) {
      for (int r = 0; r < kRows; ++r) {
        if (s % 7 == 3 && s != splits) continue;
        maxima[s * kRows + r] = max(random);
        sums[s * kRows + r] = sum(random);
        const double weight = sums[s * kRows + r] * std::exp2(double{maxima[s * kRows + r]});
        weights[r][s == splits] += weight;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      lse_.push_back(static_cast<float>(std::log(weights[r][0] + weights[r][1])));
    }
    for (int s = 0; s < slots_; ++s) {
      float* const partial = floats_.data() + s * detail::partial_floats(kDim);
      for (int r = 0; r < kRows; ++r) {
        // Pages and exact tokens have a half each of the whole sum.
        const double all = weights[r][0] + weights[r][1];
        const double share = all / (2 * weights[r][s == splits]);
        partial[detail::kTileRows * kDim + r] = maxima[s * kRows + r];
        partial[detail::kTileRows * (kDim + 1) + r] = sums[s * kRows + r];
        for (int n = 0; n < kDim && sums[s * kRows + r] > 0.0f; ++n) {
          const double value = std::sin(0.1 * n + r + (s == splits ? 2 : 0));
          partial[r * kDim + n] = static_cast<float>(share * sums[s * kRows + r] * value);
        }
      }
    }
  }
  const std::vector<float>& lse() const { return lse_; }

  template <int kRowWarps>
  Combined combine() {
    const int splits = slots_ - 1, entries = splits * detail::kShortSplitPages;
    const int exact_begin = kSinks + entries * static_cast<int>(cache::kBlockTokens);
    const int32_t row[cache::tables::kRowColumns] = {exact_begin + 100, entries, exact_begin, 1};
    std::vector<float> signs(3 * kDim, 1.0f), turns(kDim);
    for (int i = 0; i < kDim; ++i) turns[i] = i % 2 == 0 ? 0.6f : 0.8f;
    Combined result{std::vector<float>(kRows * kDim), std::vector<float>(kRows)};
    detail::DecodeArgs args{};
    args.batch = args.num_kv_heads = args.num_queries = args.tiles = 1;
    args.group = args.rows = kRows;
    args.page_slots = splits;
    args.exact_slots = 1;
    args.slots = splits + 1;
    args.by_heads = detail::Divider(1);
    args.by_group = args.by_rows = detail::Divider(kRows);
    args.plan = {.num_kv_heads = 1, .sink_tokens = kSinks, .num_queries = 1, .sliding_window = 0};
    args.v_bits = 4;
    args.out_type = cache::ElementType::kFloat32;
    args.out = {
        reinterpret_cast<const std::byte*>(result.out.data()), kRows * kDim, kDim, kDim, 1, 4};
    args.value_signs = signs.data();
    args.value_turns = turns.data();
    args.row_table = row;
    args.lse = result.lse.data();
    args.partials = floats_.data();
    EXPECT_EQ(detail::row_splits(args.plan, detail::load_row_state(row, 0)).num_splits, splits);
    simt::launch(static_cast<int>(detail::combine_blocks(args, kRowWarps)), detail::kCombineThreads,
                 detail::combine_bytes(args, kDim),
                 [&](std::byte* shared) { detail::combine_splits<kDim, kRowWarps>(args, shared); });
    return result;
  }

 private:
  int slots_;
  std::vector<float> floats_, lse_;
};

template <int kDim>
void expect_any_number_of_results() {
  const Combined expected = Partials<kDim>(1).template combine<1>();
  for (const int splits : {2, 5, 31, 32, 33, 35, 36, 63, 64, 65, 71, 100, 200, 256}) {
    SCOPED_TRACE(splits);
    Partials<kDim> partials(splits);
    const Combined lone = partials.template combine<1>();
    const Combined shared = partials.template combine<detail::kCombineTeams>();
    EXPECT_EQ(lone.out, shared.out);
    EXPECT_EQ(lone.lse, shared.lse);
    // A sum of `splits` numbers is rounded that often; the rotation adds up D of them, times
    // 1 / sqrt(D).
    const float bound = (splits + 64) * 0x1p-24f * std::sqrt(static_cast<float>(kDim));
    for (size_t i = 0; i < expected.out.size(); ++i) {
      EXPECT_NEAR(lone.out[i], expected.out[i], bound) << i;
    }
    for (int r = 0; r < kRows; ++r) {
      EXPECT_NEAR(lone.lse[r], partials.lse()[r], (splits + 64) * 0x1p-24f) << r;
    }
  }
}

TEST(EmulatedCombineSplits, AnyNumberOfResults) {
  expect_any_number_of_results<64>();
  expect_any_number_of_results<80>();
  expect_any_number_of_results<128>();
  expect_any_number_of_results<256>();
}

// Room for twice as many blocks as there are, to within one for each multiprocessor, and for all of
// them whatever their number.
TEST(CombinePlan, BlocksAreSpreadAndHaveRoomToSpare) {
  constexpr int kMultiprocessorBytes = 228 * 1024, kBytesOfSystem = 1024;
  for (const int multiprocessors : {1, 78, 132, 144}) {
    for (int64_t blocks = 1; blocks < 100000; blocks = blocks * 5 / 4 + 1) {
      const int bytes = detail::combine_spread_bytes(blocks, multiprocessors);
      ASSERT_GE(bytes, 0);
      ASSERT_LE(bytes, detail::kMaxSharedBytes);
      const int64_t places = kMultiprocessorBytes / (bytes + kBytesOfSystem) * multiprocessors;
      if (bytes > 0) {
        EXPECT_GE(places, 2 * blocks) << multiprocessors;
      }
      const int64_t wanted = 2 * blocks + multiprocessors - 1;
      if (wanted / multiprocessors <= 32) {  // as many blocks as a multiprocessor can hold
        EXPECT_LE(places, wanted) << blocks << " blocks, " << multiprocessors;
      }
    }
  }
}

}  // namespace
}  // namespace turboquant::cuda
