#include "bench/device.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace lorikeet::bench {
namespace {

constexpr int64_t kFlushBytes = int64_t{256} << 20;

__device__ uint32_t Hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  return static_cast<uint32_t>(x >> 16);
}

__global__ void Fill(__nv_bfloat16* out, int64_t count, float scale, uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const float unit = static_cast<float>(Hash(i + seed * 0x9E3779B97F4A7C15ull)) * 0x1p-31f - 1.0f;
    out[i] = __float2bfloat16(unit * scale);
  }
}

__global__ void Read(const uint4* from, int64_t count, uint32_t* sink) {
  uint32_t mix = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  constexpr int kUnroll = 8;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = __ldcs(from + i + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) mix ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  if (mix == 0x12345678) *sink = mix;  // never: the loads must stay
}

float Milliseconds(cudaEvent_t begin, cudaEvent_t end) {
  float ms = 0;
  Check(cudaEventSynchronize(end), "a timed launch");
  Check(cudaEventElapsedTime(&ms, begin, end), "timing");
  return ms;
}

}  // namespace

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

DeviceBytes::DeviceBytes(int64_t bytes) : size_(bytes) {
  Check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<int64_t>(bytes, 1)), "device memory");
}
DeviceBytes::~DeviceBytes() { cudaFree(data_); }
DeviceBytes::DeviceBytes(DeviceBytes&& other) noexcept { *this = std::move(other); }
DeviceBytes& DeviceBytes::operator=(DeviceBytes&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void FillRandom(const DeviceBytes& memory, float scale, uint32_t seed) {
  Fill<<<2048, 256>>>(memory.as<__nv_bfloat16>(), memory.size() / 2, scale, seed);
  Check(cudaDeviceSynchronize(), "random values");
}

double ReadBandwidth() {
  const DeviceBytes memory(int64_t{4} << 30), sink(4);
  FillRandom(memory, 1, 1);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> rates;
  for (int i = 0; i < 12; ++i) {
    cudaEventRecord(begin);
    Read<<<132 * 16, 256>>>(memory.as<uint4>(), memory.size() / 16, sink.as<uint32_t>());
    cudaEventRecord(end);
    const double seconds = Milliseconds(begin, end) * 1e-3;
    if (i >= 2) rates.push_back(static_cast<double>(memory.size()) / seconds);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return Median(rates);
}

double MedianReplay(const std::function<void(cudaStream_t)>& launches, int replays) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  launches(stream);
  Check(cudaStreamSynchronize(stream), "warming up");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording");
  launches(stream);
  Check(cudaStreamEndCapture(stream, &graph), "recording");
  Check(cudaGraphInstantiate(&executable, graph, 0), "recording");
  const DeviceBytes flush(kFlushBytes);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> seconds;
  for (int i = 0; i < replays + 2; ++i) {
    Check(cudaMemsetAsync(flush.data(), i, flush.size(), stream), "flushing");
    cudaEventRecord(begin, stream);
    Check(cudaGraphLaunch(executable, stream), "a replay");
    cudaEventRecord(end, stream);
    const double s = Milliseconds(begin, end) * 1e-3;
    if (i >= 2) seconds.push_back(s);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return Median(seconds);
}

std::string DeviceName() {
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0), "the device");
  return device.name;
}

}  // namespace lorikeet::bench
