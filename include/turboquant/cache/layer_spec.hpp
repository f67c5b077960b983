// Everything that fixes the meaning of one layer's stored bytes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "turboquant/cache/layout.hpp"
#include "turboquant/error.hpp"
#include "turboquant/math/hadamard.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/codebook_kind.hpp"
#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::cache {

// How a vector's one scale is stored.
enum class ScaleType { kFloat32 = 0, kFloat16 = 1 };

// Two caches with equal specs store the same tokens as the same bytes, on every backend.
struct LayerSpec {
  int head_dim = 0;      // a multiple of 8 with a Hadamard transform (math::hadamard_supported)
  int num_kv_heads = 0;  // >= 1
  int k_bits = 4;        // 1 to 8, keys and values independently
  int v_bits = 4;
  quant::ScaleRule k_rule = quant::ScaleRule::kUnbiased;
  quant::ScaleRule v_rule = quant::ScaleRule::kNormPreserving;
  ScaleType scale_type = ScaleType::kFloat16;
  bool center_keys = true;  // store a mean per block of 64 tokens; needs window_tokens >= 64
  bool smooth_keys = true;  // per-channel smoothing of keys; needs window_tokens >= 64
  int sink_tokens = 4;      // first tokens of a sequence, kept exact
  int window_tokens = 64;   // exact recent tokens: 0 or a multiple of 64; the ring holds 64 more
  uint64_t seed = 42;
  int layer = 0;  // layers with the same seed get different rotations
  quant::CodebookKind codebook = quant::CodebookKind::kScalar;  // kVector: 2 to 4 bits

  bool operator==(const LayerSpec&) const = default;

  // Throws InvalidArgument that names the argument, what is expected and what was given.
  void validate() const {
    const auto require = [](bool holds, const char* name, const std::string& expected,
                            auto actual) {
      if (!holds) turboquant::detail::throw_invalid(name, expected, std::to_string(actual));
    };
    require(head_dim >= 8 && head_dim % 8 == 0 && math::hadamard_supported(head_dim), "head_dim",
            "a multiple of 8 with " + math::hadamard_supported_text(), head_dim);
    require(num_kv_heads >= 1 && num_kv_heads <= kMaxKvHeads, "num_kv_heads",
            "1 to " + std::to_string(kMaxKvHeads), num_kv_heads);
    require(k_bits >= 1 && k_bits <= 8, "k_bits", "1 to 8", k_bits);
    require(v_bits >= 1 && v_bits <= 8, "v_bits", "1 to 8", v_bits);
    require(sink_tokens >= 0 && sink_tokens <= kMaxExactTokens, "sink_tokens",
            "0 to " + std::to_string(kMaxExactTokens), sink_tokens);
    require(
        window_tokens >= 0 && window_tokens <= kMaxExactTokens && window_tokens % kBlockTokens == 0,
        "window_tokens", "0 or a multiple of 64 up to " + std::to_string(kMaxExactTokens),
        window_tokens);
    require(!center_keys || window_tokens > 0, "center_keys",
            "false without an exact window (a block's mean is taken over 64 tokens at once; "
            "window_tokens is 0)",
            center_keys);
    require(!smooth_keys || window_tokens > 0, "smooth_keys",
            "false without an exact window (smoothing is fitted on 64 tokens at once; "
            "window_tokens is 0)",
            smooth_keys);
    require(layer >= 0, "layer", "0 or more", layer);
    require(valid_rule(k_rule), "k_rule", "0 to 3", static_cast<int>(k_rule));
    require(valid_rule(v_rule), "v_rule", "0 to 3", static_cast<int>(v_rule));
    require(scale_type == ScaleType::kFloat32 || scale_type == ScaleType::kFloat16, "scale_type",
            "0 (fp32) or 1 (fp16)", static_cast<int>(scale_type));
    require(codebook == quant::CodebookKind::kScalar || codebook == quant::CodebookKind::kVector,
            "codebook", "0 (scalar) or 1 (vector)", static_cast<int>(codebook));
    if (codebook == quant::CodebookKind::kVector) {
      constexpr const char* kWidths = "2, 3 or 4 with a vector codebook";
      require(math::VectorCodebook::exists(k_bits), "k_bits", kWidths, k_bits);
      require(math::VectorCodebook::exists(v_bits), "v_bits", kWidths, v_bits);
    }
  }

  BlockLayout block_layout() const {
    return BlockLayout{.head_dim = head_dim,
                       .k_bits = k_bits,
                       .v_bits = v_bits,
                       .scale_bytes = scale_type == ScaleType::kFloat16 ? 2 : 4,
                       .has_mean = center_keys};
  }
  ExactLayout exact_layout() const {
    return ExactLayout{.sink_tokens = sink_tokens, .window_tokens = window_tokens};
  }

  // The spec as plain integers (operator arguments, files); the order is part of the format.
  static constexpr int kNumInts = 14;
  std::vector<int64_t> to_ints() const {
    return {head_dim,
            num_kv_heads,
            k_bits,
            v_bits,
            static_cast<int64_t>(k_rule),
            static_cast<int64_t>(v_rule),
            static_cast<int64_t>(scale_type),
            center_keys,
            smooth_keys,
            sink_tokens,
            window_tokens,
            static_cast<int64_t>(seed),  // two's complement: round-trips through from_ints
            layer,
            static_cast<int64_t>(codebook)};
  }
  // Inverse of to_ints; validates, so that every spec that comes back is usable.
  static LayerSpec from_ints(std::span<const int64_t> ints) {
    if (ints.size() != kNumInts) {
      turboquant::detail::throw_invalid("spec", std::to_string(kNumInts) + " integers",
                                        std::to_string(ints.size()));
    }
    constexpr int kSeedIndex = 11;
    for (int i = 0; i < kNumInts; ++i) {
      if (i != kSeedIndex && (ints[i] < 0 || ints[i] > INT32_MAX)) {
        turboquant::detail::throw_invalid("spec[" + std::to_string(i) + "]", "0 to 2147483647",
                                          std::to_string(ints[i]));
      }
    }
    for (const int flag : {7, 8}) {
      if (ints[flag] > 1) {
        turboquant::detail::throw_invalid("spec[" + std::to_string(flag) + "]", "0 or 1",
                                          std::to_string(ints[flag]));
      }
    }
    const auto at = [&](int i) { return static_cast<int>(ints[i]); };
    LayerSpec spec{.head_dim = at(0),
                   .num_kv_heads = at(1),
                   .k_bits = at(2),
                   .v_bits = at(3),
                   .k_rule = static_cast<quant::ScaleRule>(at(4)),
                   .v_rule = static_cast<quant::ScaleRule>(at(5)),
                   .scale_type = static_cast<ScaleType>(at(6)),
                   .center_keys = at(7) != 0,
                   .smooth_keys = at(8) != 0,
                   .sink_tokens = at(9),
                   .window_tokens = at(10),
                   .seed = static_cast<uint64_t>(ints[kSeedIndex]),
                   .layer = at(12),
                   .codebook = static_cast<quant::CodebookKind>(at(13))};
    spec.validate();
    return spec;
  }

 private:
  static constexpr int kMaxKvHeads = 1 << 16;
  static constexpr int kMaxExactTokens = 1 << 20;

  static constexpr bool valid_rule(quant::ScaleRule rule) {
    return static_cast<int>(rule) >= 0 && static_cast<size_t>(rule) < quant::kScaleRules.size();
  }
};

}  // namespace turboquant::cache
