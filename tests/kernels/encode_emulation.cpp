// Compiled without FMA contraction and without type-based aliasing (tests/CMakeLists.txt).
#include "encode_emulation.hpp"

#include <algorithm>
#include <vector>

#include "encode_args.hpp"
#include "encode_steps.hpp"
#include "exact_tokens.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::testing_support {
namespace {

template <int kDim, cuda::detail::EncodeCodes kCodes>
void emulate_encode_with(const cuda::detail::EncodeArgs& args, bool backwards) {
  using cuda::detail::EncodePlan;
  using Block = cuda::detail::EncodeBlock<kDim, kCodes>;
  constexpr int kThreads = EncodePlan<kDim>::kThreads;
  const int bytes =
      EncodePlan<kDim>::bytes(std::max(args.sides[0].bits, args.sides[1].bits), args.vector);
  const int encode_blocks = args.workers * args.num_heads * 2;
  const int keep_blocks = args.batch * cuda::detail::KeepBlock::blocks_per_row(args);
  const int blocks = encode_blocks + keep_blocks;
  for (int i = 0; i < blocks; ++i) {
    const int index = backwards ? blocks - 1 - i : i;  // nor may a block depend on another
    SharedMemory memory(bytes, EncodePlan<kDim>::kTileBytes);
    if (index >= encode_blocks) {
      std::vector<cuda::detail::KeepBlock> threads;
      for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back(args, reinterpret_cast<cuda::detail::EncodedRange*>(memory.data()),
                             index - encode_blocks, t, kThreads);
      }
      cuda::detail::keep_steps(each_of(threads, backwards));
      continue;
    }
    std::vector<Block> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back(args, memory.data(),
                           cuda::detail::BlockPlace{index / 2 / args.num_heads,
                                                    index / 2 % args.num_heads, index % 2},
                           t);
    }
    if (threads[0].empty()) continue;
    const auto each = each_of(threads, backwards);
    cuda::detail::encode_steps<kDim>(threads[0], each, each, HostCopies{});
  }
}

template <int kDim>
void emulate_encode(const cuda::detail::EncodeArgs& args, bool backwards) {
  using cuda::detail::EncodeCodes;
  if (args.vector) return emulate_encode_with<kDim, EncodeCodes::kVector>(args, backwards);
  if (std::max(args.sides[0].bits, args.sides[1].bits) <= quant::kIndexedCellBits) {
    return emulate_encode_with<kDim, EncodeCodes::kNarrow>(args, backwards);
  }
  emulate_encode_with<kDim, EncodeCodes::kScalar>(args, backwards);
}

void emulate_fit(const cuda::detail::EncodeArgs& args, bool backwards) {
  using cuda::detail::FitBlock;
  for (int index = 0; index < args.batch * args.num_heads; ++index) {
    SharedMemory memory(FitBlock::bytes(args.dim));
    std::vector<FitBlock> threads;
    for (int t = 0; t < FitBlock::kThreads; ++t) {
      threads.emplace_back(args, memory.data(), index, t);
    }
    cuda::detail::fit_steps(threads[0], each_of(threads, backwards));
  }
}

}  // namespace

void emulate_encode_append(const cuda::EncodeAppendParams& params, bool backwards, int max_jobs) {
  cuda::check_encode_append(params);
  cuda::detail::EncodeArgs args = cuda::detail::make_encode_args(params);
  args.workers = (args.num_jobs + max_jobs - 1) / max_jobs;
  if (params.may_fit_smoothing && params.spec.smooth_keys) emulate_fit(args, backwards);
  switch (params.spec.head_dim) {
#define TQ_CASE(dim) \
  case dim:          \
    return emulate_encode<dim>(args, backwards);
    TQ_CODEC_HEAD_DIMS(TQ_CASE)
#undef TQ_CASE
  }
}

}  // namespace turboquant::testing_support
