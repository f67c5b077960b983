// Which tokens of a row leave the exact ones for its pages when tokens are appended: the one rule,
// for the host's PageTable and for tables that live on a device.
#pragma once

#include <cstdint>

#include "turboquant/cache/layout.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cache {

// A row's committed tokens.
struct RowExtent {
  int64_t length = 0;
  int64_t num_entries = 0;
  int64_t paged_tokens = 0;            // of all entries
  int64_t last_tokens = kBlockTokens;  // of the last entry; 64 where there is none
};

// First token of the exact ring: behind the sinks and the pages.
TQ_HOST_DEVICE constexpr int64_t exact_begin(const ExactLayout& exact, int64_t length,
                                             int64_t paged_tokens) {
  const int64_t sinks = length < exact.sink_tokens ? length : exact.sink_tokens;
  return sinks + paged_tokens;
}

// Tokens that stay in pages when a row is cropped to new_length.
TQ_HOST_DEVICE constexpr int64_t kept_paged_tokens(const ExactLayout& exact, int64_t paged_tokens,
                                                   int64_t new_length) {
  const int64_t behind_sinks = new_length < exact.sink_tokens ? 0 : new_length - exact.sink_tokens;
  return paged_tokens < behind_sinks ? paged_tokens : behind_sinks;
}

// Tokens [first_token, first_token + tokens) go to slots page_offset... of the row's entry.
struct AppendPiece {
  int64_t first_token;
  int64_t tokens;
  int64_t entry;        // a new one unless page_offset > 0
  int64_t page_offset;  // > 0: continues the last entry
};

// Whether the piece is the first of a row without pages: smoothing is fitted on it.
TQ_HOST_DEVICE constexpr bool fits_smoothing(const AppendPiece& piece) {
  return piece.entry == 0 && piece.page_offset == 0;
}

// The pieces of one row's append, in order. With a window W the ring holds at most W + 63 tokens:
// when it would hold W + 64, its oldest 64 become a new entry. Without a window every token behind
// the sinks goes to an entry at once, and a last entry that is not full is continued.
class AppendPieces {
 public:
  TQ_HOST_DEVICE constexpr AppendPieces(const ExactLayout& exact, const RowExtent& row,
                                        int64_t new_tokens)
      : window_tokens_(exact.window_tokens),
        begin_(exact_begin(exact, row.length + new_tokens, row.paged_tokens)),
        end_(row.length + new_tokens),
        entry_(row.num_entries),
        last_tokens_(row.last_tokens) {}

  // False behind the last piece.
  TQ_HOST_DEVICE constexpr bool next(AppendPiece& piece) {
    int64_t tokens = kBlockTokens, page_offset = 0;
    if (window_tokens_ > 0) {
      if (end_ - begin_ < window_tokens_ + kBlockTokens) return false;
    } else {
      if (end_ <= begin_) return false;
      if (last_tokens_ < kBlockTokens) {
        page_offset = last_tokens_;
        --entry_;
      }
      if (end_ - begin_ < kBlockTokens - page_offset) {
        tokens = end_ - begin_;
      } else {
        tokens = kBlockTokens - page_offset;
      }
      last_tokens_ = page_offset + tokens;
    }
    piece = {begin_, tokens, entry_, page_offset};
    begin_ += tokens;
    ++entry_;
    return true;
  }

 private:
  int64_t window_tokens_, begin_, end_, entry_, last_tokens_;
};

// Most pieces that an append of new_tokens to any row can have.
TQ_HOST_DEVICE constexpr int64_t max_append_pieces(const ExactLayout& exact, int64_t new_tokens) {
  // The ring holds at most W + 63 tokens before; without a window the last entry may lack one.
  if (new_tokens <= 0) return 0;
  return exact.window_tokens > 0 ? (new_tokens + kBlockTokens - 1) / kBlockTokens
                                 : 1 + (new_tokens + kBlockTokens - 2) / kBlockTokens;
}

}  // namespace turboquant::cache
