// What a project outside this one does first: one call into the headers, one into the library.
#include <cstdio>
#include <cstring>

#include "turboquant/math/codebook.hpp"
#include "turboquant/version.hpp"

int main() {
  const turboquant::math::Codebook& codebook = turboquant::math::Codebook::sphere(128, 4);
  std::printf("turboquant %s, %d levels\n", turboquant::version(), 1 << codebook.bits());
  return std::strcmp(turboquant::version(), TQ_VERSION_STRING);
}
