#include "turboquant/cache/layer_codec.hpp"

#include <map>
#include <mutex>

namespace turboquant::cache {
namespace {

LayerCodec::Side make_side(const LayerSpec& spec, int bits, quant::ScaleRule rule,
                           quant::StreamPurpose purpose) {
  LayerCodec::Side side{.bits = bits,
                        .rule = rule,
                        .codebook = nullptr,
                        .vector_codebook = nullptr,
                        .table = {},
                        .rotations = {}};
  if (spec.codebook == quant::CodebookKind::kVector) {
    side.vector_codebook = &math::VectorCodebook::gaussian(bits);
    side.table = quant::make_decode_table(*side.vector_codebook);
  } else {
    side.codebook = &math::Codebook::sphere(spec.head_dim, bits);
    side.table = quant::make_decode_table(bits, side.codebook->levels());
  }
  side.rotations.reserve(spec.num_kv_heads);
  for (int head = 0; head < spec.num_kv_heads; ++head) {
    side.rotations.emplace_back(spec.head_dim, spec.seed,
                                quant::rotation_stream(spec.layer, head, purpose));
  }
  return side;
}

const LayerSpec& validated(const LayerSpec& spec) {
  spec.validate();
  return spec;
}

// More specs than a process uses at once; beyond it, codecs that nobody holds are dropped.
constexpr size_t kKeptCodecs = 1024;

}  // namespace

LayerCodec::LayerCodec(const LayerSpec& spec)
    : spec_(validated(spec)),
      layout_(spec.block_layout()),
      exact_(spec.exact_layout()),
      keys_(make_side(spec, spec.k_bits, spec.k_rule, quant::StreamPurpose::kKeys)),
      values_(make_side(spec, spec.v_bits, spec.v_rule, quant::StreamPurpose::kValues)) {}

std::shared_ptr<const LayerCodec> LayerCodec::get(const LayerSpec& spec) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, std::shared_ptr<const LayerCodec>> codecs;
  const std::vector<int64_t> key = spec.to_ints();
  {
    const std::lock_guard lock(mutex);
    if (const auto found = codecs.find(key); found != codecs.end()) return found->second;
  }
  auto made = std::make_shared<const LayerCodec>(spec);  // outside the lock: it may take long
  const std::lock_guard lock(mutex);
  if (codecs.size() >= kKeptCodecs) {
    std::erase_if(codecs, [](const auto& entry) { return entry.second.use_count() == 1; });
  }
  return codecs.try_emplace(key, std::move(made)).first->second;
}

}  // namespace turboquant::cache
