#include "engine/runner/model_runner.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/runner/gates.h"

namespace lorikeet {
namespace {

absl::StatusOr<Precision> ChoosePrecision(const std::string& name, const ModelSource& source) {
  if (name == "exact") return Precision::kExact;
  if (name == "fast") return Precision::kFast;
  if (name == "auto") {
    const bool full = source.weight(LayerModule(0, Linear::kQ)).dtype == DType::kF32;
    return full ? Precision::kExact : Precision::kFast;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("precision is \"", name, "\"; it must be auto, exact or fast"));
}

absl::StatusOr<Quantization> ChooseQuantization(const std::string& name, Precision precision) {
  if (name == "none") return Quantization::kNone;
  if (name != "fp8") {
    return absl::InvalidArgumentError(
        absl::StrCat("quantization is \"", name, "\"; it must be none or fp8"));
  }
  if (precision == Precision::kFast) return Quantization::kFp8;
  return absl::InvalidArgumentError(
      "quantization is \"fp8\" and precision exact, which keeps the stored weights; set precision to "
      "fast");
}

// auto: CUDA where this build and this machine have it, else the CPU and in `no_gpu` the reason.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const std::string& device,
                                                     const BackendOptions& options,
                                                     absl::Status* no_gpu) {
  const bool quantized = options.quantization != Quantization::kNone;
  if (device == "cpu" && quantized) {
    return absl::InvalidArgumentError("quantization is for GPUs; device is \"cpu\"");
  }
  if (device == "cpu") return MakeCpuBackend(options);
  if (device != "auto" && device != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("device is \"", device, "\"; it must be auto, cpu or cuda"));
  }
  absl::StatusOr<std::unique_ptr<Backend>> cuda = MakeCudaBackend(options);
  if (cuda.ok() || device == "cuda" || quantized) return cuda;
  if (!absl::IsFailedPrecondition(cuda.status())) return cuda.status();
  *no_gpu = cuda.status();
  return MakeCpuBackend(options);
}

// `sequences` of `tokens` new tokens each, all in the pool's first pages: what they write is nobody's.
Batch EmptyBatch(const KvLayout& kv, int32_t sequences, int32_t tokens,
                 const SamplingParams& sampling) {
  Batch batch;
  batch.sequence_begin.push_back(0);
  batch.page_begin.push_back(0);
  batch.tokens.assign(int64_t{sequences} * tokens, 0);
  for (int32_t s = 0; s < sequences; ++s) {
    for (int32_t t = 0; t < tokens; ++t) batch.positions.push_back(t);
    for (int32_t p = 0; p < kv.PagesFor(tokens); ++p) batch.pages.push_back(p);
    batch.requests.push_back(0);
    batch.sequence_begin.push_back((s + 1) * tokens);
    batch.page_begin.push_back(static_cast<int32_t>(batch.pages.size()));
    batch.logit_rows.push_back({.row = (s + 1) * tokens - 1,
                                .sequence = s,
                                .sampling = &sampling,
                                .history = std::span(batch.tokens).first(1),
                                .prompt_tokens = 1});
  }
  return batch;
}

KvLayout MakeLayout(const ModelConfig& config, DType dtype) {
  return KvLayout::Make(config.layers, config.kv_heads, config.head_dim, dtype);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> ModelRunner::Create(
    std::shared_ptr<const ModelSource> source, const RunnerOptions& options) {
  LK_ASSIGN_OR_RETURN(const Precision precision, ChoosePrecision(options.precision, *source));
  LK_ASSIGN_OR_RETURN(const Quantization quantization,
                      ChooseQuantization(options.quantization, precision));
  const BackendOptions backend_options{.precision = precision,
                                       .quantization = quantization,
                                       .stored = source->weight(LayerModule(0, Linear::kQ)).dtype,
                                       .threads = options.threads,
                                       .experts = source->config().expert_modules(),
                                       .experts_per_token = source->config().experts_per_token,
                                       .max_rows = options.limits.max_batch_tokens,
                                       .pinned_bytes = options.pinned_bytes,
                                       .record = options.record,
                                       .batch_invariant = options.batch_invariant};
  absl::Status no_gpu;
  LK_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                      MakeBackend(options.device, backend_options, &no_gpu));
  LK_ASSIGN_OR_RETURN(std::unique_ptr<Model> model,
                      Model::Load(source, backend.get(), options.limits.max_batch_tokens));
  const KvLayout layout = MakeLayout(source->config(), backend->kv_dtype());
  const int32_t pages = backend->AllocatePages(layout, options.kv_bytes);
  LK_RETURN_IF_ERROR(backend->status());
  if (pages < layout.pages_per_block) {
    return absl::InvalidArgumentError(
        absl::StrCat("the KV cache has ", pages * layout.page_bytes(), " bytes; ", KvLayout::kPageTokens,
                     " tokens of this model alone take ",
                     layout.pages_per_block * layout.page_bytes()));
  }
  std::unique_ptr<ModelRunner> runner(new ModelRunner(
      std::move(source), std::move(backend), std::move(model), precision, layout, pages));
  runner->no_gpu_ = no_gpu;
  LK_RETURN_IF_ERROR(runner->WarmUp());
  return runner;
}

ModelRunner::ModelRunner(std::shared_ptr<const ModelSource> source,
                         std::unique_ptr<Backend> backend, std::unique_ptr<Model> model,
                         Precision precision, const KvLayout& kv, int32_t pages)
    : backend_(std::move(backend)),
      model_(std::move(model)),
      base_model_(source),
      precision_(precision),
      kv_(kv),
      pages_(pages) {}

absl::Status ModelRunner::WarmUp() {
  SamplingParams sampling;
  sampling.temperature = 0;
  for (const int32_t rows : backend_->slow_first_rows()) {
    if (kv_.PagesFor(rows) <= pages_) {
      LK_RETURN_IF_ERROR(Run(EmptyBatch(kv_, 1, rows, sampling)).status());
    }
    // The second is recorded. More rows than a step samples at a time are no decoding step.
    for (int i = 0; i < 2 && rows <= backend_->max_logit_rows(); ++i) {
      LK_RETURN_IF_ERROR(Run(EmptyBatch(kv_, rows, 1, sampling)).status());
    }
  }
  return absl::OkStatus();
}

// A bit a token for each constrained row. An error leaves a row nothing, which ends its request.
void ModelRunner::FillMasks() {
  constrained_.clear();
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].constraint != nullptr) constrained_.push_back(static_cast<int32_t>(i));
  }
  if (constrained_.empty()) return;
  int32_t widest = base_model_.vocab_size();  // as a grammar of the base's tokens needs
  for (const int32_t i : constrained_) {
    widest = std::max(widest, rows_[i].width(base_model_.vocab_size()));
  }
  const size_t words = (static_cast<size_t>(widest) + 31) / 32;
  masks_.resize(constrained_.size() * words);
  backend_->ParallelFor(static_cast<int32_t>(constrained_.size()), [&](int32_t i, int32_t) {
    LogitRow& row = rows_[constrained_[i]];
    const std::span mask = std::span(masks_).subspan(i * words, words);
    std::ranges::fill(mask, 0);
    if (!row.constraint->Allowed(mask).ok()) std::ranges::fill(mask, 0);
    row.allowed = mask;
  });
}

// Rows from `begin` on that are answered together: as many as the backend takes at a time, all
// sampled or all pooled.
int32_t ModelRunner::RowsOfAKind(int32_t begin) const {
  const auto most = std::min<size_t>(rows_.size(), int64_t{begin} + backend_->max_logit_rows());
  size_t end = begin + 1;
  while (end < most && !rows_[end].embedding == !rows_[begin].embedding) ++end;
  return static_cast<int32_t>(end) - begin;
}

absl::Status ModelRunner::Sample(int32_t begin, std::span<SampledToken> out) {
  const auto rows = static_cast<int32_t>(out.size());
  return backend_->Sample(model_->Logits(begin, rows),
                          std::span<const LogitRow>(rows_).subspan(begin, rows), out);
}

absl::Status ModelRunner::Pool(int32_t begin, int32_t rows) {
  LK_RETURN_IF_ERROR(model_->Hidden(begin, rows, &hidden_));
  const size_t width = hidden_.size() / rows;
  for (int32_t i = 0; i < rows; ++i) {
    rows_[begin + i].embedding->Add(std::span(hidden_).subspan(i * width, width));
  }
  return absl::OkStatus();
}

absl::Status ModelRunner::ComputeGates(const Batch& batch) {
  gates_.clear();
  if (batch.base_pages.empty()) return absl::OkStatus();
  // Sequences whose adapters have gates, as a batch of base rows whose results are all wanted.
  std::vector<int32_t> rows, tokens, positions, begin = {0}, page_begin = {0}, all, pages;
  const auto page = [&](int32_t i) { return batch.base_pages.begin() + batch.base_page_begin[i]; };
  for (int32_t s = 0; s < batch.sequences(); ++s) {
    if (page(s) == page(s + 1)) continue;
    for (int32_t r = batch.sequence_begin[s]; r < batch.sequence_begin[s + 1]; ++r) {
      all.push_back(static_cast<int32_t>(rows.size()));
      rows.push_back(r);
      tokens.push_back(batch.tokens[r]);
      positions.push_back(batch.positions[r]);
    }
    pages.insert(pages.end(), page(s), page(s + 1));
    begin.push_back(static_cast<int32_t>(rows.size()));
    page_begin.push_back(static_cast<int32_t>(pages.size()));
  }
  model_->Forward({.tokens = tokens, .positions = positions, .sequence_begin = begin,
                   .page_begin = page_begin, .page_ids = pages, .logit_rows = all, .segments = {}});
  LK_RETURN_IF_ERROR(backend_->status());
  LK_RETURN_IF_ERROR(model_->Hidden(0, static_cast<int32_t>(rows.size()), &hidden_));
  GateRows(batch, rows);
  return absl::OkStatus();
}

// From the hidden states of `rows`.
void ModelRunner::GateRows(const Batch& batch, std::span<const int32_t> rows) {
  const size_t width = hidden_.size() / rows.size();
  std::vector<const Gating*> gating(batch.rows());
  for (const AdapterSegment& segment : batch.segments) {
    for (int32_t r = segment.row_begin; r < segment.row_end; ++r) gating[r] = &segment.adapter->gating;
  }
  size_t values = 0;
  for (const int32_t row : rows) values += gating[row]->width();
  gate_values_.resize(values);
  gates_.assign(batch.rows(), nullptr);
  std::vector<std::span<float>> of_row(rows.size());
  std::span<float> left = gate_values_;
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::span<float> gates = left.first(gating[rows[i]]->width());
    left = left.subspan(gates.size());
    of_row[i] = gates;
    gates_[rows[i]] = gates.data();
  }
  backend_->ParallelFor(static_cast<int32_t>(rows.size()), [&](int32_t i, int32_t) {
    EvaluateGates(*gating[rows[i]], std::span(hidden_).subspan(i * width, width), of_row[i]);
  });
}

absl::StatusOr<StepResult> ModelRunner::Run(const Batch& batch) {
  rows_.assign(batch.logit_rows.begin(), batch.logit_rows.end());
  logit_rows_.clear();
  for (const LogitRow& row : batch.logit_rows) logit_rows_.push_back(row.row);
  LK_RETURN_IF_ERROR(ComputeGates(batch));
  model_->Forward({.tokens = batch.tokens,
                   .positions = batch.positions,
                   .sequence_begin = batch.sequence_begin,
                   .page_begin = batch.page_begin,
                   .page_ids = batch.pages,
                   .logit_rows = logit_rows_,
                   .segments = batch.segments,
                   .gates = gates_});
  LK_RETURN_IF_ERROR(backend_->status());
  // While a GPU computes. On the CPU all cores have just become free, and have nothing to gain from a
  // thread more.
  FillMasks();
  const int32_t wanted = static_cast<int32_t>(logit_rows_.size());
  StepResult result;
  result.sampled.resize(wanted);
  for (int32_t begin = 0, rows = 0; begin < wanted; begin += rows) {
    rows = RowsOfAKind(begin);
    LK_RETURN_IF_ERROR(rows_[begin].embedding != nullptr
                           ? Pool(begin, rows)
                           : Sample(begin, std::span(result.sampled).subspan(begin, rows)));
  }
  return result;
}

}  // namespace lorikeet
