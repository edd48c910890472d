#include "bench/model_steps.h"

#include <algorithm>

#include "bench/device.h"
#include "engine/base/check.h"

namespace lorikeet::bench {

double ModelSteps::Measure(int32_t sequences, int32_t context, int32_t rows,
                           const std::vector<std::shared_ptr<const Adapter>>& adapters, int repeats) {
  tokens_.clear(), positions_.clear(), page_ids_.clear(), segments_.clear(), logits_.clear();
  begin_.assign(1, 0), page_begin_.assign(1, 0);
  int32_t page = 0;
  for (int32_t s = 0; s < sequences; ++s) {
    for (int32_t r = 0; r < rows; ++r) {
      tokens_.push_back((s * 7919 + r * 31) % 100000);
      positions_.push_back(context - rows + r);
    }
    for (int32_t p = 0; p < layout_.PagesFor(context); ++p) page_ids_.push_back(page++);
    const int32_t end = static_cast<int32_t>(tokens_.size());
    logits_.push_back(end - 1);
    if (!adapters.empty()) {
      const Adapter* adapter = adapters[s % adapters.size()].get();
      const bool goes_on = !segments_.empty() && segments_.back().adapter == adapter &&
                           segments_.back().row_end == begin_.back();
      if (goes_on) segments_.back().row_end = end;
      else if (adapter != nullptr) segments_.push_back({begin_.back(), end, adapter});
    }
    begin_.push_back(end);
    page_begin_.push_back(static_cast<int32_t>(page_ids_.size()));
  }
  std::vector<double> seconds;
  for (int i = 0; i < repeats + 3; ++i) {
    const double start = Now();
    Step();
    if (i >= 3) seconds.push_back(Now() - start);
  }
  return Median(seconds);
}

void ModelSteps::Step() {
  model_->Forward({tokens_, positions_, begin_, page_begin_, page_ids_, logits_, segments_});
  SamplingParams greedy;
  greedy.temperature = 0;
  const int32_t wanted = static_cast<int32_t>(logits_.size());
  for (int32_t at = 0; at < wanted; at += backend_->max_logit_rows()) {
    const int32_t rows = std::min(wanted - at, backend_->max_logit_rows());
    std::vector<LogitRow> asked(rows);
    for (LogitRow& row : asked) row.sampling = &greedy;
    std::vector<SampledToken> out(rows);
    const absl::Status status = backend_->Sample(model_->Logits(at, rows), asked, out);
    LK_CHECK_MSG(status.ok(), status.ToString());
  }
}

}  // namespace lorikeet::bench
