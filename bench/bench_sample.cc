// Sampling alone, over a vocabulary of 128,256: time of the launches (recorded, cache flushed),
// bytes of one read of the logits and its share of the read bandwidth measured in the same run, and
// time of a whole call with its plan and copies, the cache as the call before left it. Rows are
// "model" (a few tokens stand out) or "flat" (many are about as likely).
//   bench_sample
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "bench/device.h"
#include "engine/kernels/cuda/device_sampler.h"

namespace lorikeet::bench {
namespace {

constexpr int32_t kVocab = 128256;

struct Kind {
  const char* name;
  SamplingParams params;
};
const Kind kKinds[] = {
    {"greedy", {.temperature = 0}},
    {"greedy logprobs 5", {.temperature = 0, .top_logprobs = 5}},
    {"temperature", {.temperature = 0.8f}},
    {"top-p 0.95", {.temperature = 0.8f, .top_p = 0.95f}},
    {"top-k 50 top-p 0.95", {.temperature = 0.8f, .top_p = 0.95f, .top_k = 50}},
    {"min-p 0.05", {.min_p = 0.05f}},
    {"top-p penalties", {.top_p = 0.95f, .repetition_penalty = 1.1f, .presence_penalty = 0.5f}},
};

std::vector<float> Logits(int32_t rows, bool flat) {
  std::mt19937 rng(rows);
  std::normal_distribution<float> normal(0, flat ? 1.0f : 2.5f);
  std::vector<float> one(kVocab), all;
  for (float& x : one) x = normal(rng);
  if (!flat) {
    for (int i = 0; i < 40; ++i) {
      one[rng() % kVocab] = 14.0f + static_cast<float>(rng() % 1000) * 0.006f;
    }
  }
  for (int32_t r = 0; r < rows; ++r) {
    std::rotate(one.begin(), one.begin() + 977, one.end());
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

void Stop(const cuda::FirstError& errors) {
  if (errors.status().ok()) return;
  std::fprintf(stderr, "%s\n", errors.status().ToString().c_str());
  std::exit(1);
}

void Measure(const Kind& kind, int32_t rows, bool flat, double bandwidth) {
  const DeviceBytes memory = Upload(Logits(rows, flat));
  const Matrix logits(memory.data(), rows, kVocab);
  std::mt19937 rng(7);
  std::vector<int32_t> history(2000);
  for (int32_t& id : history) id = static_cast<int32_t>(rng() % kVocab);
  std::vector<SamplingParams> params(rows, kind.params);
  std::vector<LogitRow> wanted(rows);
  for (int32_t r = 0; r < rows; ++r) {
    params[r].seed = r;
    wanted[r].row = wanted[r].sequence = r;
    wanted[r].sampling = &params[r];
    wanted[r].history = history;
    wanted[r].prompt_tokens = 1000;
  }
  std::vector<SampledToken> out(rows);
  cuda::FirstError errors;
  double call = 0;
  {
    cudaStream_t stream;
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    cuda::DeviceSampler sampler(&errors, stream);
    std::vector<double> seconds;
    for (int i = 0; i < 15; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      sampler.Sample(logits, wanted, out);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      if (i >= 4) seconds.push_back(took.count());
    }
    std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
    call = seconds[seconds.size() / 2];
    Stop(errors);
    cudaStreamDestroy(stream);
  }
  cuda::DeviceSampler sampler(&errors, nullptr);
  sampler.Send(logits, wanted);
  Check(cudaDeviceSynchronize(), "the jobs");
  const double launches =
      MedianReplay([&](cudaStream_t stream) { sampler.Launch(logits, stream); });
  Stop(errors);
  const double bytes = 4.0 * kVocab * rows;
  std::printf("%-20s %-5s %4d rows  %8.1f us  %7.2f MB  %5.0f GB/s  %3.0f %%  call %8.1f us\n",
              kind.name, flat ? "flat" : "model", rows, launches * 1e6, bytes / 1e6,
              bytes / launches / 1e9, 100 * bytes / launches / bandwidth, call * 1e6);
  std::fflush(stdout);
}

int Run() {
  const double bandwidth = ReadBandwidth();
  std::printf("%s, read bandwidth %.0f GB/s\n", DeviceName().c_str(), bandwidth / 1e9);
  for (const Kind& kind : kKinds) {
    for (const bool flat : {false, true}) {
      for (const int32_t rows : {1, 32, 256}) Measure(kind, rows, flat, bandwidth);
    }
  }
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main() { return lorikeet::bench::Run(); }
