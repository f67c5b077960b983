#include "turboquant/cuda/dequantize.hpp"

#include <cstdint>
#include <string>

#include "turboquant/cache/table_checks.hpp"
#include "turboquant/cuda/params_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {

void check_dequantize(const DequantizeParams& p) {
  check_kernel_spec(p.spec);
  const int64_t batch = p.out_keys.shape[0];
  const int64_t positions = p.out_keys.shape[2];
  const std::array<int64_t, 4> out = {batch, p.spec.num_kv_heads, positions, p.spec.head_dim};
  cache::check_shape("out_keys", p.out_keys, out);
  cache::check_shape("out_values", p.out_values, out);
  cache::check_exact(p.spec, batch, p.exact_keys, p.exact_values);
  cache::check_pages(p.spec, p.pages);
  check_pointer("smoothing", p.smoothing, p.spec.smooth_keys);
  check_pointer("rows", p.rows, batch > 0);
  check_pointer("page_table", p.page_table, batch > 0 && p.page_columns > 0);
  check_tables(p.spec, p.tables);
  const auto check_range = [](const char* argument, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    turboquant::detail::throw_invalid(argument, std::to_string(low) + " to " + std::to_string(high),
                                      std::to_string(value));
  };
  check_range("past_tokens", p.past_tokens, positions, INT32_MAX);
  check_range("first_position", p.first_position, 0, p.past_tokens - positions);
  check_count("page_columns", p.page_columns, 1);
  check_count("out_keys.shape[0]", batch,
              2 * int64_t{p.spec.num_kv_heads} * (p.page_columns + positions + 1));
}

}  // namespace turboquant::cuda
