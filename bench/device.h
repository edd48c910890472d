// What the GPU benchmarks share: random memory, timing of recorded launches, the read bandwidth
// that results are measured against.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lorikeet::bench {

// Stops the program with the error's text.
void Check(cudaError_t error, const char* what);

double Now();  // seconds, of a steady clock
double Median(std::vector<double> values);  // REQUIRES: not empty

// Device memory, freed at the end.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  explicit DeviceBytes(int64_t bytes);
  ~DeviceBytes();
  DeviceBytes(DeviceBytes&& other) noexcept;
  DeviceBytes& operator=(DeviceBytes&& other) noexcept;

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }
  template <typename T>
  T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

// Random bfloat16 values of about `scale` in all of it.
void FillRandom(const DeviceBytes& memory, float scale, uint32_t seed);
template <typename T>
DeviceBytes Upload(const std::vector<T>& values) {
  DeviceBytes memory(static_cast<int64_t>(values.size() * sizeof(T)));
  Check(cudaMemcpy(memory.data(), values.data(), memory.size(), cudaMemcpyHostToDevice), "upload");
  return memory;
}

// Bytes a second that a kernel which only reads gets from device memory: the median of several
// passes over 4 GiB.
double ReadBandwidth();

// Records `launches` once on a stream and replays it; the second-level cache is overwritten before
// each replay. Median seconds of one.
double MedianReplay(const std::function<void(cudaStream_t)>& launches, int replays = 15);

std::string DeviceName();

}  // namespace lorikeet::bench
