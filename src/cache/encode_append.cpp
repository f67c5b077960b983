// Compiled without FMA contraction (src/CMakeLists.txt): the stored bits are part of the format.
#include "turboquant/cache/encode_append.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/smoothing_rule.hpp"
#include "turboquant/cache/stored_scale.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/error.hpp"
#include "turboquant/quant/quantize_rows.hpp"

namespace turboquant::cache {
namespace {

using turboquant::detail::throw_invalid;

struct Counts {
  int64_t saturated = 0;
  int64_t non_finite = 0;
};

bool all_finite(const float* row, int64_t dim) {
  // x - x is 0 for finite x and NaN otherwise: one sum instead of a branch per element.
  float sum = 0.0f;
  for (int64_t i = 0; i < dim; ++i) sum += row[i] - row[i];
  return sum == 0.0f;
}

class Append {
 public:
  Append(const EncodeAppendParams& params, const LayerCodec& codec)
      : p_(params), codec_(codec), layout_(codec.layout()), dim_(codec.spec().head_dim) {}

  // Tokens [first, first + tokens) of one head as fp32 rows [tokens, D].
  void gather(const RowState& row, const EncodeJob& job, int head, const ConstTensorView& chunk,
              const ConstTensorView& exact, float* out) const {
    for (int64_t i = 0; i < job.tokens; ++i) {
      const int64_t t = job.first_token + i;
      if (t < row.length) {
        load_row(exact, job.row, head, codec_.exact().slot(t), out + i * dim_);
      } else {
        load_row(chunk, job.row, head, first_new_token(row, chunk.shape[2]) + t - row.length,
                 out + i * dim_);
      }
    }
  }

  float* smoothing(const EncodeJob& job, int head) const {
    return p_.smoothing + (int64_t{job.row} * codec_.spec().num_kv_heads + head) * dim_;
  }

  void fit_smoothing(const EncodeJob& job, int head, float* block) const {
    gather(row_state(p_.rows, job.row), job, head, p_.key_states, p_.exact_keys, block);
    float* const s = smoothing(job, head);
    bool finite[kBlockTokens];
    int count = 0;
    for (int t = 0; t < job.tokens; ++t) {
      finite[t] = all_finite(block + t * dim_, dim_);
      count += finite[t];
    }
    std::vector<float> rms(dim_);
    for (int64_t c = 0; c < dim_; ++c) {
      float sum = 0.0f;
      for (int t = 0; t < job.tokens; ++t) {
        if (finite[t]) sum += block[t * dim_ + c];
      }
      const float mean = sum / static_cast<float>(count);
      float squares = 0.0f;
      for (int t = 0; t < job.tokens; ++t) {
        if (!finite[t]) continue;
        const float centred = block[t * dim_ + c] - mean;
        squares += centred * centred;
      }
      rms[c] = std::sqrt(squares / static_cast<float>(count));
    }
    const int dim = static_cast<int>(dim_);
    float median_rms = std::numeric_limits<float>::quiet_NaN();
    for (int c = 0; c < dim; ++c) {
      if (smoothing_rank(rms.data(), dim, c) == dim / 2) median_rms = rms[c];
    }
    for (int c = 0; c < dim; ++c) s[c] = smoothing_of(rms[c], median_rms);
  }

  void encode_keys(const EncodeJob& job, int head, float* block, Counts& counts) const {
    gather(row_state(p_.rows, job.row), job, head, p_.key_states, p_.exact_keys, block);
    if (codec_.spec().smooth_keys) {
      const float* const s = smoothing(job, head);
      for (int t = 0; t < job.tokens; ++t) {
        for (int64_t c = 0; c < dim_; ++c) block[t * dim_ + c] /= s[c];
      }
    }
    codec_.keys().rotations[head].apply(block, job.tokens);
    std::byte* const stored = p_.pages.block(job.page, head);
    if (codec_.spec().center_keys) subtract_mean(job.tokens, block, stored, counts);
    store_rows(codec_.keys(), job, block, stored + layout_.k_row(job.page_offset),
               layout_.k_row_bytes(), stored + layout_.k_scale(job.page_offset), counts);
  }

  void encode_values(const EncodeJob& job, int head, float* block, Counts& counts) const {
    gather(row_state(p_.rows, job.row), job, head, p_.value_states, p_.exact_values, block);
    codec_.values().rotations[head].apply(block, job.tokens);
    std::byte* const stored = p_.pages.block(job.page, head);
    store_rows(codec_.values(), job, block, stored + layout_.v_row(job.page_offset),
               layout_.v_row_bytes(), stored + layout_.v_scale(job.page_offset), counts);
  }

  // The chunk's tokens that no job encoded, to their slots. Never allocates or throws: it is the
  // first step that committed tokens could notice.
  void keep_exact(std::span<const EncodeJob> jobs) const noexcept {
    size_t n = 0;
    for (int64_t b = 0; b < p_.key_states.shape[0]; ++b) {
      const RowState row = row_state(p_.rows, b);
      int64_t encoded_end = 0;
      for (; n < jobs.size() && jobs[n].row == b; ++n) {
        encoded_end = int64_t{jobs[n].first_token} + jobs[n].tokens;
      }
      const int64_t first = first_new_token(row, p_.key_states.shape[2]);
      for (int head = 0; head < codec_.spec().num_kv_heads; ++head) {
        for (int64_t i = 0; i < row.new_tokens; ++i) {
          const int64_t t = row.length + i;
          if (t >= codec_.spec().sink_tokens && t < encoded_end) continue;
          const int64_t slot = codec_.exact().slot(t);
          copy_row(p_.key_states, b, head, first + i, p_.exact_keys, b, head, slot);
          copy_row(p_.value_states, b, head, first + i, p_.exact_values, b, head, slot);
        }
      }
    }
  }

 private:
  void subtract_mean(int tokens, float* block, std::byte* stored, Counts& counts) const {
    bool finite[kBlockTokens];
    int count = 0;
    for (int t = 0; t < tokens; ++t) {
      finite[t] = all_finite(block + t * dim_, dim_);
      count += finite[t];
    }
    for (int64_t c = 0; c < dim_; ++c) {
      float sum = 0.0f;
      for (int t = 0; t < tokens; ++t) {
        if (finite[t]) sum += block[t * dim_ + c];
      }
      const float mean = count > 0 ? sum / static_cast<float>(count) : 0.0f;
      const uint16_t bits = saturated_fp16(mean, counts.saturated);
      std::memcpy(stored + layout_.k_mean_offset() + c * sizeof bits, &bits, sizeof bits);
      const float stored_mean = math::fp32_from_fp16(bits);
      for (int t = 0; t < tokens; ++t) block[t * dim_ + c] -= stored_mean;
    }
  }

  void store_rows(const LayerCodec::Side& side, const EncodeJob& job, const float* block,
                  std::byte* codes, int64_t row_bytes, std::byte* scales, Counts& counts) const {
    float row_scales[kBlockTokens];
    quant::QuantizeRowsParams rows{.dim = static_cast<int>(dim_),
                                   .bits = side.bits,
                                   .levels = {},
                                   .boundaries = {},
                                   .rule = side.rule,
                                   .rows = block,
                                   .row_stride_elems = dim_,
                                   .num_rows = job.tokens,
                                   .codes = reinterpret_cast<uint8_t*>(codes),
                                   .codes_stride_bytes = row_bytes,
                                   .scales = row_scales,
                                   .vector_codebook = side.vector_codebook};
    if (side.codebook != nullptr) {
      rows.levels = side.codebook->levels();
      rows.boundaries = side.codebook->boundaries();
    }
    counts.non_finite += quant::quantize_rows(rows);
    for (int t = 0; t < job.tokens; ++t) {
      store_scale(codec_.spec().scale_type, row_scales[t], scales + t * layout_.scale_bytes,
                  counts.saturated);
    }
  }

  const EncodeAppendParams& p_;
  const LayerCodec& codec_;
  const BlockLayout& layout_;
  int64_t dim_;
};

void check(const EncodeAppendParams& p) {
  const int64_t batch = p.key_states.shape[0];
  const int64_t chunk_tokens = p.key_states.shape[2];
  const std::array<int64_t, 4> chunk = {batch, p.spec.num_kv_heads, chunk_tokens, p.spec.head_dim};
  check_shape("key_states", p.key_states, chunk);
  check_shape("value_states", p.value_states, chunk);
  check_exact(p.spec, batch, p.exact_keys, p.exact_values);
  for (const ElementType type : {p.value_states.type, p.exact_keys.type, p.exact_values.type}) {
    if (type != p.key_states.type) {
      throw_invalid("exact_keys, exact_values, value_states", "the element type of key_states",
                    "another");
    }
  }
  if (p.spec.smooth_keys && p.smoothing == nullptr) throw_invalid("smoothing", "data", "null");
  if (p.counters == nullptr) throw_invalid("counters", "data", "null");
  check_pages(p.spec, p.pages);
  check_rows(p.spec, p.rows, batch, chunk_tokens);
  check_jobs(p.spec, p.jobs, p.rows, batch, p.pages);
}

}  // namespace

void encode_append(const EncodeAppendParams& params, const ParallelFor& parallel_for) {
  const auto codec = LayerCodec::get(params.spec);
  check(params);
  const Append append(params, *codec);
  const int64_t num_heads = params.spec.num_kv_heads;
  const int64_t block_elems = int64_t{kBlockTokens} * params.spec.head_dim;

  std::vector<EncodeJob> jobs;
  for (size_t n = 0; n < params.jobs.size() / tables::kJobColumns; ++n) {
    if (const EncodeJob job = job_at(params.jobs, n); job.tokens > 0) jobs.push_back(job);
  }

  // 1. Smoothing, before any key of its row is encoded.
  if (params.spec.smooth_keys) {
    std::vector<EncodeJob> fits;
    std::ranges::copy_if(jobs, std::back_inserter(fits), &EncodeJob::fit_smoothing);
    parallel_for(fits.size() * num_heads, [&](int64_t begin, int64_t end) {
      std::vector<float> block(block_elems);
      for (int64_t item = begin; item < end; ++item) {
        append.fit_smoothing(fits[item / num_heads], static_cast<int>(item % num_heads),
                             block.data());
      }
    });
  }

  // 2. Codes. Only slots that no committed token uses are written.
  std::atomic<int64_t> saturated{0};
  std::atomic<int64_t> non_finite{0};
  parallel_for(static_cast<int64_t>(jobs.size()) * num_heads, [&](int64_t begin, int64_t end) {
    std::vector<float> block(block_elems);
    Counts counts;
    for (int64_t item = begin; item < end; ++item) {
      const EncodeJob& job = jobs[item / num_heads];
      const int head = static_cast<int>(item % num_heads);
      append.encode_keys(job, head, block.data(), counts);
      append.encode_values(job, head, block.data(), counts);
    }
    saturated += counts.saturated;
    non_finite += counts.non_finite;
  });

  // 3. Exact tokens.
  append.keep_exact(jobs);
  params.counters[0] += saturated;
  params.counters[1] += non_finite;
}

}  // namespace turboquant::cache
