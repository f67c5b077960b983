// Which family of codebooks a layer's codes belong to.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "turboquant/error.hpp"

namespace turboquant::quant {

enum class CodebookKind {
  kScalar = 0,  // math::Codebook: a coordinate at a time, 1 to 8 bits
  kVector = 1,  // math::VectorCodebook: pairs of coordinates, 2 to 4 bits
};

inline constexpr std::array<CodebookKind, 2> kCodebookKinds = {CodebookKind::kScalar,
                                                               CodebookKind::kVector};

constexpr std::string_view codebook_kind_name(CodebookKind kind) {
  switch (kind) {
    case CodebookKind::kScalar:
      return "scalar";
    case CodebookKind::kVector:
      return "vector";
  }
  return "unknown";
}

inline CodebookKind parse_codebook_kind(std::string_view name) {
  for (const CodebookKind kind : kCodebookKinds) {
    if (codebook_kind_name(kind) == name) return kind;
  }
  turboquant::detail::throw_invalid("codebook", "scalar or vector", std::string(name));
}

}  // namespace turboquant::quant
