// What decode_attention and extend_attention ask of their parameters.
#pragma once

#include <cstdint>

#include "turboquant/cuda/decode_attention.hpp"

namespace turboquant::cuda::detail {

// Throws InvalidArgument. workspace_bytes: what a call needs, asked when its shapes are known to
// fit.
void check_attention(const DecodeAttentionParams& params, int64_t max_queries,
                     int64_t (*workspace_bytes)(const DecodeAttentionParams&));

}  // namespace turboquant::cuda::detail
