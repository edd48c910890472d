#include "tests/support/model_harness.h"

#include <algorithm>
#include <numeric>

#include "tests/support/load_images.h"

namespace lorikeet {

ModelHarness::ModelHarness(const std::filesystem::path& model, Precision precision, int32_t lanes,
                           int32_t max_tokens, int32_t threads, bool batch_invariant) {
  absl::StatusOr<std::unique_ptr<ModelSource>> source = ModelSource::Open(model);
  LK_CHECK_MSG(source.ok(), source.status().ToString());
  source_ = *std::move(source);
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeTestBackend(
      {.precision = precision, .threads = threads, .experts = source_->config().expert_modules(),
       .experts_per_token = source_->config().experts_per_token, .max_rows = kMaxRows,
       .batch_invariant = batch_invariant});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  backend_ = *std::move(backend);
  absl::StatusOr<std::unique_ptr<Model>> loaded = Model::Load(source_, backend_.get(), kMaxRows);
  LK_CHECK_MSG(loaded.ok(), loaded.status().ToString());
  model_ = *std::move(loaded);
  const ModelConfig& config = source_->config();
  layout_ = KvLayout::Make(config.layers, config.kv_heads, config.head_dim, backend_->kv_dtype());
  lane_blocks_ = layout_.PagesFor(max_tokens) / layout_.pages_per_block;
  next_page_ = lanes * lane_blocks_ * layout_.pages_per_block;
  constexpr int64_t kImageBytes = int64_t{64} << 20;
  const int64_t image_bytes = backend_->images() != nullptr ? kImageBytes : 0;
  backend_->AllocatePages(layout_, next_page_ * layout_.page_bytes() + image_bytes);
}

void ModelHarness::LoadAdapters(const std::vector<Lane*>& lanes) {
  for (const Lane* lane : lanes) {
    const std::shared_ptr<const Adapter>& adapter = lane->adapter.share();
    if (adapter == nullptr) continue;
    for (const auto& image : {adapter->shared, adapter}) {
      if (image == nullptr || !loaded_.emplace(image.get(), AdapterLease(image)).second) continue;
      next_page_ = LoadImages(backend_->images(), {&image, 1}, next_page_);
    }
  }
}

std::vector<std::vector<std::vector<float>>> ModelHarness::Step(std::vector<Lane*> lanes,
                                                                const std::vector<int32_t>& rows) {
  LoadAdapters(lanes);
  const auto adapter_of = [&](int32_t i) { return lanes[i]->adapter.get(); };
  std::vector<int32_t> order(lanes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return adapter_of(a) < adapter_of(b); });
  std::vector<int32_t> tokens, positions, sequence_begin = {0}, page_begin = {0};
  std::vector<int32_t> page_ids, logit_rows;
  std::vector<AdapterSegment> segments;
  for (int32_t i : order) {
    Lane& lane = *lanes[i];
    if (rows[i] == 0) continue;
    const int32_t begin = static_cast<int32_t>(tokens.size());
    for (int32_t r = 0; r < rows[i]; ++r) {
      tokens.push_back(lane.tokens[lane.computed + r]);
      positions.push_back(lane.computed + r);
    }
    const int32_t end = static_cast<int32_t>(tokens.size());
    sequence_begin.push_back(end);
    // Pages of different lanes interleave, so that a wrong page id is a wrong result.
    const int32_t blocks = lane.computed + rows[i] + KvLayout::kPageTokens - 1;
    for (int32_t b = 0; b < blocks / KvLayout::kPageTokens; ++b) {
      for (int32_t p = 0; p < layout_.pages_per_block; ++p) {
        page_ids.push_back((b * layout_.pages_per_block + p) * static_cast<int32_t>(lanes.size()) + i);
      }
    }
    page_begin.push_back(static_cast<int32_t>(page_ids.size()));
    const Adapter* adapter = adapter_of(i);
    if (adapter && !segments.empty() && segments.back().adapter == adapter) {
      segments.back().row_end = end;
    } else if (adapter) {
      segments.push_back({begin, end, adapter});
    }
  }
  logit_rows.resize(tokens.size());
  std::iota(logit_rows.begin(), logit_rows.end(), 0);
  model_->Forward({tokens, positions, sequence_begin, page_begin, page_ids, logit_rows, segments});

  std::vector<std::vector<float>> flat;
  const int32_t wanted = static_cast<int32_t>(tokens.size());
  for (int32_t begin = 0; begin < wanted; begin += backend_->max_logit_rows()) {
    const Matrix logits =
        model_->Logits(begin, std::min(backend_->max_logit_rows(), wanted - begin));
    for (int32_t r = 0; r < logits.rows; ++r) {
      const absl::Status copied =
          backend_->Download(logits.row(r), flat.emplace_back(logits.width));
      LK_CHECK_MSG(copied.ok(), copied.ToString());
    }
  }
  std::vector<std::vector<std::vector<float>>> out(lanes.size());
  int32_t at = 0;
  for (int32_t i : order) {
    for (int32_t r = 0; r < rows[i]; ++r) out[i].push_back(std::move(flat[at++]));
    lanes[i]->computed += rows[i];
  }
  return out;
}

std::vector<std::vector<float>> ModelHarness::Run(Lane* lane) {
  return Step({lane}, {static_cast<int32_t>(lane->tokens.size()) - lane->computed})[0];
}

int32_t ArgMax(const std::vector<float>& values) {
  return static_cast<int32_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

}  // namespace lorikeet
