#include "turboquant/math/vector_codebook.hpp"

#include <array>
#include <cstdint>

namespace turboquant::math {
namespace {

#include "math/vector_codebook_levels.inc"

std::array<float, 2 * VectorCodebook::kEntries> in_units(const int8_t* levels) {
  std::array<float, 2 * VectorCodebook::kEntries> floats{};
  for (size_t i = 0; i < floats.size(); ++i)
    floats[i] = static_cast<float>(levels[i]) * VectorCodebook::kUnit;
  return floats;
}

}  // namespace

const VectorCodebook& VectorCodebook::gaussian(int bits) {
  static const VectorCodebook two(2, in_units(kLevels2), kDistortion2);
  static const VectorCodebook three(3, in_units(kLevels3), kDistortion3);
  static const VectorCodebook four(4, in_units(kLevels4), kDistortion4);
  switch (bits) {
    case 2:
      return two;
    case 3:
      return three;
    case 4:
      return four;
    default:
      turboquant::detail::throw_invalid("bits", "2, 3 or 4 for a vector codebook",
                                        std::to_string(bits));
  }
}

}  // namespace turboquant::math
