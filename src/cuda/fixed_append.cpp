#include "turboquant/cuda/fixed_append.hpp"

#include <cstdint>
#include <string>

#include "turboquant/cuda/params_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {

void check_fixed_append(const FixedAppendParams& params, bool is_plan) {
  const cache::FixedTables& tables = params.tables;
  const auto require_at_least = [](const char* argument, int64_t least, int64_t actual) {
    if (actual >= least) return;
    turboquant::detail::throw_invalid(argument, std::to_string(least) + " or more",
                                      std::to_string(actual));
  };
  require_at_least("max_tokens", 1, tables.max_tokens);
  require_at_least("chunk_tokens", 0, tables.chunk_tokens);
  require_at_least("page_columns", 1, tables.page_columns);
  const int64_t jobs = cache::max_append_pieces(tables.exact, tables.chunk_tokens);
  check_count("rows.shape[0]", tables.batch, (jobs + 1) * cache::tables::kJobColumns);
  check_pointer("rows", tables.rows, tables.batch > 0);
  check_pointer("page_table", tables.page_table, tables.batch > 0);
  check_pointer("positions", tables.positions, tables.batch > 0);
  check_pointer("planned", params.planned, tables.batch > 0);
  check_pointer("jobs", params.jobs, is_plan && tables.batch * jobs > 0);
}

}  // namespace turboquant::cuda
