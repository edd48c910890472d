#include "engine/kernels/cuda/device_sampler.h"

#include <algorithm>
#include <cstring>

#include "engine/base/check.h"
#include "engine/kernels/cuda/launch.cuh"

namespace lorikeet::cuda {
namespace {

template <typename T>
int64_t Bytes(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size() * sizeof(T));
}

int64_t ResultBytes(int64_t rows) { return rows * int64_t{sizeof(SampleResult)}; }
int64_t TopBytes(int64_t rows) {
  return rows * Limits::kMaxTopLogprobs * int64_t{sizeof(TopToken)};
}
// Chunks of `jobs` jobs and logits of `seen` tokens.
int64_t WorkBytes(int64_t jobs, int64_t chunks, int64_t seen) {
  return (3 * jobs * chunks + seen) * int64_t{sizeof(float)};
}

}  // namespace

DeviceSampler::~DeviceSampler() {
  for (const Block& block : {input_, output_, work_}) cudaFree(block.data);
  for (const Block& block : {host_input_, host_output_}) cudaFreeHost(block.data);
}

void DeviceSampler::Reserve(int64_t bytes, Block* device, Block* host) {
  if (bytes <= device->bytes) return;
  constexpr int64_t kLeastBytes = 64 << 10;
  const int64_t size = std::max(2 * bytes, kLeastBytes);
  errors_->Note(cudaStreamSynchronize(stream_), "a step");
  cudaFree(device->data);
  *device = {};
  errors_->Note(cudaMalloc(reinterpret_cast<void**>(&device->data), size), "memory of samples");
  device->bytes = size;
  if (host == nullptr) return;
  cudaFreeHost(host->data);
  *host = {};
  errors_->Note(cudaMallocHost(reinterpret_cast<void**>(&host->data), size), "memory of samples");
  host->bytes = size;
}

void DeviceSampler::Prepare(int64_t rows, int64_t vocab) {
  constexpr int64_t kSeen = 64 << 10;
  const int64_t jobs = 2 * rows * int64_t{sizeof(SampleJob)};
  Reserve(jobs + kSeen * int64_t{sizeof(SeenToken)}, &input_, &host_input_);
  Reserve(ResultBytes(rows) + TopBytes(rows), &output_, &host_output_);
  Reserve(WorkBytes(rows, DivideUp(vocab, kChunk), kSeen), &work_, nullptr);
}

void DeviceSampler::PlaceArrays(int64_t rows, int64_t vocab) {
  const int64_t jobs = Bytes(plan_.raw) + Bytes(plan_.penalized);
  const int64_t most_jobs = std::max<int64_t>(plan_.raw.size(), plan_.penalized.size());
  chunks_.count = DivideUp(vocab, kChunk);
  const int64_t entries = most_jobs * chunks_.count;
  Reserve(jobs + Bytes(plan_.seen), &input_, &host_input_);
  Reserve(ResultBytes(rows) + TopBytes(rows), &output_, &host_output_);
  Reserve(WorkBytes(most_jobs, chunks_.count, static_cast<int64_t>(plan_.seen.size())), &work_,
          nullptr);
  raw_ = reinterpret_cast<const SampleJob*>(input_.data);
  penalized_ = raw_ + plan_.raw.size();
  seen_ = reinterpret_cast<const SeenToken*>(penalized_ + plan_.penalized.size());
  out_.results = reinterpret_cast<SampleResult*>(output_.data);
  out_.tops = reinterpret_cast<TopToken*>(output_.data + ResultBytes(rows));
  chunks_.best = reinterpret_cast<uint32_t*>(work_.data);
  chunks_.weights = reinterpret_cast<float*>(work_.data) + entries;
  chunks_.totals = chunks_.weights + entries;
  saved_ = chunks_.totals + entries;
}

void DeviceSampler::Send(Matrix logits, std::span<const LogitRow> rows) {
  LK_CHECK(logits.dtype == DType::kF32 && logits.rows >= static_cast<int64_t>(rows.size()));
  PlanSamples(rows, logits.width, &plan_);
  LK_CHECK(plan_.most_vocab > 0 && plan_.most_vocab <= kChunk * kMaxChunks);
  PlaceArrays(static_cast<int64_t>(rows.size()), plan_.most_vocab);
  if (!errors_->status().ok()) return;
  std::byte* to = host_input_.data;
  const auto append = [&](const auto& values) {
    if (!values.empty()) std::memcpy(to, values.data(), Bytes(values));
    to += Bytes(values);
  };
  append(plan_.raw);
  append(plan_.penalized);
  append(plan_.seen);
  errors_->Note(cudaMemcpyAsync(input_.data, host_input_.data, to - host_input_.data,
                                cudaMemcpyHostToDevice, stream_),
                "the copy of sampling's jobs");
}

void DeviceSampler::Launch(Matrix logits, cudaStream_t stream) {
  const int32_t raw = static_cast<int32_t>(plan_.raw.size());
  const int32_t penalized = static_cast<int32_t>(plan_.penalized.size());
  if (raw > 0) {
    errors_->Note(LaunchScanChunks(logits, raw_, raw, chunks_, stream), "sampling");
    errors_->Note(LaunchChoose(logits, raw_, raw, chunks_, seen_, saved_, out_, stream),
                  "sampling");
  }
  if (penalized == 0) return;
  if (plan_.most_seen > 0) {
    errors_->Note(LaunchPenalize(logits, penalized_, penalized, seen_, plan_.most_seen, saved_,
                                 stream),
                  "penalties");
  }
  errors_->Note(LaunchScanChunks(logits, penalized_, penalized, chunks_, stream), "sampling");
  errors_->Note(LaunchChoose(logits, penalized_, penalized, chunks_, seen_, saved_, out_, stream),
                "sampling");
}

void DeviceSampler::Receive(std::span<const LogitRow> rows, std::span<SampledToken> out) {
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t bytes = ResultBytes(count) + (plan_.want_top ? TopBytes(count) : 0);
  errors_->Note(cudaMemcpyAsync(host_output_.data, output_.data, bytes, cudaMemcpyDeviceToHost,
                                stream_),
                "a result");
  errors_->Note(cudaStreamSynchronize(stream_), "a step");
  if (!errors_->status().ok()) return;
  const auto* results = reinterpret_cast<const SampleResult*>(host_output_.data);
  const auto* tops = reinterpret_cast<const TopToken*>(host_output_.data + ResultBytes(count));
  for (int64_t i = 0; i < count; ++i) {
    out[i].token = results[i].token;
    out[i].logprobs.logprob = results[i].logprob;
    out[i].logprobs.top.clear();
  }
  if (!plan_.want_top) return;
  for (const SampleJob& job : plan_.raw) {
    if (out[job.row].token == SampledToken::kNoToken) continue;
    const TopToken* top = tops + int64_t{job.row} * Limits::kMaxTopLogprobs;
    for (int32_t k = 0; k < job.top; ++k) {
      out[job.row].logprobs.top.emplace_back(top[k].id, top[k].logprob);
    }
  }
}

void DeviceSampler::Sample(Matrix logits, std::span<const LogitRow> rows,
                           std::span<SampledToken> out) {
  if (rows.empty()) return;
  Send(logits, rows);
  if (!errors_->status().ok()) return;
  Launch(logits, stream_);
  Receive(rows, out);
}

}  // namespace lorikeet::cuda
