#include "turboquant/cuda/encode_append.hpp"

#include <cstdint>
#include <string>

#include "turboquant/cache/table_checks.hpp"
#include "turboquant/cuda/params_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {

using turboquant::detail::throw_invalid;

void check_encode_append(const EncodeAppendParams& p) {
  check_kernel_spec(p.spec);
  const int64_t batch = p.key_states.shape[0];
  const int64_t chunk_tokens = p.key_states.shape[2];
  const std::array<int64_t, 4> chunk = {batch, p.spec.num_kv_heads, chunk_tokens, p.spec.head_dim};
  cache::check_shape("key_states", p.key_states, chunk);
  cache::check_shape("value_states", p.value_states, chunk);
  cache::check_exact(p.spec, batch, p.exact_keys, p.exact_values);
  for (const cache::ElementType type :
       {p.value_states.type, p.exact_keys.type, p.exact_values.type}) {
    if (type != p.key_states.type) {
      throw_invalid("exact_keys, exact_values, value_states", "the element type of key_states",
                    "another");
    }
  }
  check_pointer("smoothing", p.smoothing, p.spec.smooth_keys);
  check_pointer("counters", p.counters, true);
  check_pointer("rows", p.rows, batch > 0);
  check_pointer("jobs", p.jobs, p.num_jobs > 0);
  check_tables(p.spec, p.tables);
  cache::check_pages(p.spec, p.pages);
  check_count("num_jobs", p.num_jobs, 2 * int64_t{p.spec.num_kv_heads});
  check_count("key_states.shape[2]", chunk_tokens, 1);
  const int64_t kept =
      2 * int64_t{p.spec.num_kv_heads} * (p.spec.exact_layout().capacity() + int64_t{16});
  check_count("key_states.shape[0]", batch, kept);
}

}  // namespace turboquant::cuda
