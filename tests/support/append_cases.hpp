// Appends for backends that must store the CPU encoder's bytes: random layers, chunks that are hard
// to get right, and the storage that an append works on, as plain bytes that any device can copy.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "tensor.hpp"
#include "turboquant/cache/encode_append.hpp"
#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cache/tensor_view.hpp"

namespace turboquant::testing_support {

// head_dims that the CUDA kernels take.
inline constexpr std::array<int, 13> kKernelHeadDims = {8,  16, 24,  32,  40,  48, 64,
                                                        80, 96, 128, 160, 192, 256};

// Everything that an append reads and writes besides the chunk, in one piece each.
struct AppendStorage {
  std::vector<std::byte> exact_keys, exact_values, pages;  // pages: slabs in order
  std::vector<float> smoothing;
  std::array<int64_t, 2> counters{};
};

// A layer that grows by random appends. Storage starts as 0xFF bytes: what must not be written is
// compared too.
class AppendCase {
 public:
  struct Options {
    int head_dim;
    uint32_t seed;
  };

  explicit AppendCase(const Options& options) : random_(options.seed) {
    spec_.head_dim = options.head_dim;
    spec_.num_kv_heads = pick({1, 2, 3});
    if (pick({0, 0, 1}) != 0) {
      spec_.codebook = quant::CodebookKind::kVector;
      spec_.k_bits = pick({2, 3, 4});
      spec_.v_bits = pick({2, 3, 4});
    } else {
      spec_.k_bits = pick({1, 2, 3, 4, 5, 6, 7, 8});
      spec_.v_bits = pick({1, 2, 3, 4, 5, 6, 7, 8});
    }
    spec_.k_rule = quant::kScaleRules[pick({0, 1, 2, 3})];
    spec_.v_rule = quant::kScaleRules[pick({0, 1, 2, 3})];
    spec_.scale_type = pick({0, 1}) ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32;
    spec_.sink_tokens = pick({0, 4, 5});
    spec_.window_tokens = pick({0, 64, 64, 128});
    spec_.center_keys = spec_.window_tokens > 0 && pick({0, 1, 1}) != 0;
    spec_.smooth_keys = spec_.window_tokens > 0 && pick({0, 1, 1}) != 0;
    spec_.seed = options.seed;
    spec_.layer = pick({0, 7});
    type_ = static_cast<cache::ElementType>(pick({0, 1, 2}));
    batch_ = pick({1, 2, 3});
    pages_per_slab_ = pick({1, 3});
    table_ = std::make_unique<cache::PageTable>(batch_, spec_.sink_tokens, spec_.window_tokens);
    const int64_t exact_bytes = int64_t{batch_} * spec_.num_kv_heads *
                                spec_.exact_layout().capacity() * spec_.head_dim *
                                cache::element_bytes(type_);
    storage_.exact_keys.assign(exact_bytes, std::byte{0xFF});
    storage_.exact_values.assign(exact_bytes, std::byte{0xFF});
    if (spec_.smooth_keys) {
      storage_.smoothing.assign(int64_t{batch_} * spec_.num_kv_heads * spec_.head_dim, 1.0f);
    }
  }

  const cache::LayerSpec& spec() const { return spec_; }
  cache::ElementType type() const { return type_; }
  int batch() const { return batch_; }
  int64_t pages_per_slab() const { return pages_per_slab_; }
  AppendStorage& storage() { return storage_; }
  const cache::PageTable& table() const { return *table_; }
  int64_t page_bytes() const { return spec_.block_layout().page_bytes(spec_.num_kv_heads); }

  // One append. The chunk and the tables are made, then `run(*this, storage)` carries it out on a
  // copy of the storage for a backend under test, then the CPU on the storage itself. Returns
  // the first difference between what both left, or nothing.
  struct Chunk {
    Tensor keys, values;
    std::vector<int32_t> rows, jobs;
    bool fits;
    int64_t num_jobs() const {
      return static_cast<int64_t>(jobs.size()) / cache::tables::kJobColumns;
    }
  };
  std::string append_cpu() {
    return append([](const AppendCase&, const Chunk&, AppendStorage&) {}, false);
  }
  template <class Run>
  std::string append(Run run, bool compare = true) {
    const int64_t tokens = pick({1, 1, 2, 3, 63, 64, 65, 130, 200, 333});
    std::vector<int32_t> counts(batch_);
    for (int32_t& count : counts) {
      count = static_cast<int32_t>(pick({0, 1, 1, 1}) ? tokens : pick_below(tokens + 1));
    }
    const cache::AppendPlan plan = table_->plan_append(counts);
    Chunk chunk = make_chunk(tokens, counts, plan);
    const int64_t slabs = (plan.pages_needed + pages_per_slab_ - 1) / pages_per_slab_;
    storage_.pages.resize(
        std::max<size_t>(storage_.pages.size(), slabs * pages_per_slab_ * page_bytes()),
        std::byte{0xFF});
    for (const cache::PageCopy& copy : plan.copies) {
      std::memcpy(storage_.pages.data() + copy.to_page * page_bytes(),
                  storage_.pages.data() + copy.from_page * page_bytes(), page_bytes());
    }
    AppendStorage tested = storage_;
    run(*this, chunk, tested);
    run_cpu(chunk);
    table_->commit(plan);
    return compare ? difference(tested) : "";
  }

  // Shortens every row, as a crop of the cache does.
  void crop() {
    for (int b = 0; b < batch_; ++b) {
      const int64_t length = table_->length(b);
      table_->crop(b, length - std::min<int64_t>(length, pick_below(70)));
    }
  }

  // Views of storage that lies somewhere: data pointers are the caller's.
  cache::TensorView exact_view(void* data) const {
    return cache::TensorView::contiguous(
        data, type_, {batch_, spec_.num_kv_heads, spec_.exact_layout().capacity(), spec_.head_dim});
  }
  cache::PagePoolView pages_view(std::byte* const* slabs, size_t pages_bytes) const {
    return {.slabs = slabs,
            .num_slabs = static_cast<int64_t>(pages_bytes) / (pages_per_slab_ * page_bytes()),
            .pages_per_slab = pages_per_slab_,
            .page_bytes = page_bytes(),
            .block_bytes = spec_.block_layout().block_bytes()};
  }
  std::vector<std::byte*> slab_addresses(std::byte* pages, size_t pages_bytes) const {
    std::vector<std::byte*> addresses;
    const int64_t slab_bytes = pages_per_slab_ * page_bytes();
    for (int64_t at = 0; at < static_cast<int64_t>(pages_bytes); at += slab_bytes) {
      addresses.push_back(pages + at);
    }
    return addresses;
  }

  std::string text() const {
    std::ostringstream text;
    text << "type " << static_cast<int>(type_) << ", spec";
    for (const int64_t value : spec_.to_ints()) text << " " << value;
    return text.str();
  }

 private:
  int pick(std::initializer_list<int> choices) {
    return choices.begin()[random_() % choices.size()];
  }
  int64_t pick_below(int64_t end) { return static_cast<int64_t>(random_() % end); }

  Chunk make_chunk(int64_t tokens, const std::vector<int32_t>& counts,
                   const cache::AppendPlan& plan) {
    const std::array<int64_t, 4> shape = {batch_, spec_.num_kv_heads, tokens, spec_.head_dim};
    const bool gaps = pick({0, 0, 1}) != 0;
    Chunk chunk{.keys = Tensor::random(type_, shape, random_(), 2.0f, gaps),
                .values = Tensor::random(type_, shape, random_(), 0.0f, gaps),
                .rows = table_->export_rows(counts),
                .jobs = {},
                .fits = false};
    for (Tensor* tensor : {&chunk.keys, &chunk.values}) {
      for (int64_t i = pick({0, 0, 3, 20}); i > 0; --i) spoil(*tensor, shape);
    }
    for (int64_t b = 0; b < batch_; ++b) {  // left padding is never read
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t t = 0; t < tokens - counts[b]; ++t) {
          chunk.keys.fill_row(b, h, t, kNan);
          chunk.values.fill_row(b, h, t, kNan);
        }
      }
    }
    for (const cache::EncodeJob& job : plan.jobs) {
      chunk.jobs.insert(chunk.jobs.end(), {job.row, job.first_token, job.tokens, job.page,
                                           job.page_offset, job.fit_smoothing});
      chunk.fits |= job.fit_smoothing != 0;
    }
    return chunk;
  }

  std::string difference(const AppendStorage& tested) const {
    const auto first = [](const auto& a, const auto& b) {
      return std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin();
    };
    if (tested.counters != storage_.counters) {
      return "counters " + std::to_string(tested.counters[0]) + ", " +
             std::to_string(tested.counters[1]) + " instead of " +
             std::to_string(storage_.counters[0]) + ", " + std::to_string(storage_.counters[1]);
    }
    if (!storage_.smoothing.empty() &&
        std::memcmp(tested.smoothing.data(), storage_.smoothing.data(),
                    storage_.smoothing.size() * sizeof(float)) != 0) {
      return "smoothing";
    }
    if (tested.exact_keys != storage_.exact_keys) return "exact keys";
    if (tested.exact_values != storage_.exact_values) return "exact values";
    if (tested.pages == storage_.pages) return "";
    const cache::BlockLayout layout = spec_.block_layout();
    const int64_t at = first(tested.pages, storage_.pages);
    const int64_t in_block = at % layout.block_bytes();
    const auto place = [&](const char* part, int64_t offset, int64_t token_bytes) {
      return std::string(part) + " of token " + std::to_string((in_block - offset) / token_bytes) +
             ", byte " + std::to_string((in_block - offset) % token_bytes);
    };
    const std::string block = "block " + std::to_string(at / layout.block_bytes()) + ", ";
    if (in_block >= layout.v_scales_offset()) {
      return block + place("value scale", layout.v_scales_offset(), layout.scale_bytes);
    }
    if (in_block >= layout.v_codes_offset()) {
      return block + place("value codes", layout.v_codes_offset(), layout.v_row_bytes());
    }
    if (in_block >= layout.k_scales_offset()) {
      return block + place("key scale", layout.k_scales_offset(), layout.scale_bytes);
    }
    if (in_block >= layout.k_codes_offset()) {
      return block + place("key codes", layout.k_codes_offset(), layout.k_row_bytes());
    }
    return block + place("key mean", 0, 2);
  }

  // Makes one row of a chunk a hard one.
  void spoil(Tensor& tensor, const std::array<int64_t, 4>& shape) {
    const int64_t b = pick_below(shape[0]), h = pick_below(shape[1]), t = pick_below(shape[2]);
    std::vector<float> row = tensor.row(b, h, t);
    const auto scale = [&](float factor) {
      for (float& x : row) x *= factor;
    };
    switch (pick({0, 1, 2, 3, 4, 5, 6, 7, 8, 9})) {
      case 0:
        scale(0.0f);
        break;
      case 1:
        row[pick_below(shape[3])] = INFINITY;
        break;
      case 2:
        scale(kNan);
        break;
      case 3:  // fp16 scales saturate
        scale(1e7f);
        break;
      case 4:  // squares overflow
        scale(1e25f);
        break;
      case 5:  // the rotation overflows
        scale(1e38f);
        break;
      case 6:  // squares underflow
        scale(1e-20f);
        break;
      case 7:  // subnormal numbers
        scale(1e-38f);
        break;
      case 8:
        scale(0.0f);
        row[pick_below(shape[3])] = -3.0f;
        break;
      default:  // tiny and zero numbers among others
        row[pick_below(shape[3])] = 1e-35f;
        row[pick_below(shape[3])] = -0.0f;
        row[pick_below(shape[3])] = -4e-41f;
    }
    tensor.set_row(b, h, t, row);
  }

  void run_cpu(const Chunk& chunk) {
    const std::vector<std::byte*> slabs =
        slab_addresses(storage_.pages.data(), storage_.pages.size());
    cache::encode_append({.spec = spec_,
                          .key_states = chunk.keys.view(),
                          .value_states = chunk.values.view(),
                          .exact_keys = exact_view(storage_.exact_keys.data()),
                          .exact_values = exact_view(storage_.exact_values.data()),
                          .smoothing = storage_.smoothing.data(),
                          .pages = pages_view(slabs.data(), storage_.pages.size()),
                          .rows = chunk.rows,
                          .jobs = chunk.jobs,
                          .counters = storage_.counters.data()},
                         serial());
  }

  std::mt19937 random_;
  cache::LayerSpec spec_;
  cache::ElementType type_{};
  int batch_ = 0;
  int64_t pages_per_slab_ = 1;
  std::unique_ptr<cache::PageTable> table_;
  AppendStorage storage_;
};

}  // namespace turboquant::testing_support
