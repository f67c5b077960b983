// Division by a number that the host knows, without a division: those that a kernel starts with
// take longer than what they are for. Granlund and Montgomery, "Division by invariant integers
// using multiplication" (1994).
#pragma once

#include <cstdint>

#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

struct Quotient {
  int quotient, remainder;
};

class Divider {
 public:
  Divider() = default;
  // divisor: 1 to 2^31 - 1.
  constexpr explicit Divider(int divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    if (divisor_ == 1) return;
    while (uint64_t{2} << shift_ < divisor_) ++shift_;  // 2^shift < divisor <= 2^(shift + 1)
    factor_ = static_cast<uint32_t>((uint64_t{1} << (32 + shift_)) / divisor_ + 1);
  }

  // n >= 0. Exact: factor * divisor exceeds 2^(32 + shift) by at most divisor <= 2^(shift + 1), so
  // for n < 2^31 the product exceeds n / divisor by less than 1 / divisor.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr Quotient operator()(int n) const {
    const auto of = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>(uint64_t{of} * factor_ >> 32) >> shift_;
    const uint32_t quotient = divisor_ == 1 ? of : high;
    return {static_cast<int>(quotient), static_cast<int>(of - quotient * divisor_)};
  }

 private:
  uint32_t divisor_ = 1, factor_ = 0, shift_ = 0;
};

}  // namespace turboquant::cuda::detail
