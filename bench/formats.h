// Adapters of every kind as PEFT saves them for a base's shapes: configuration and tensors, without
// values.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "engine/api/base_model.h"
#include "engine/base/dtype.h"
#include "nlohmann/json.hpp"

namespace lorikeet::bench {

struct FileTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::function<int64_t(int64_t i)> integer = nullptr;  // value i of a tensor of integers
};

struct Format {
  std::string name;
  nlohmann::ordered_json config;
  std::vector<FileTensor> tensors;
  int64_t own_bytes = 0;  // of its parameters on a device, as the method counts them
  int experts = 0;         // LoRAs of its tensors below it, task_0 and so on (Arrow)
  bool copied = false;    // a load copies its tensors, transposed or not, and computes nothing
};

std::vector<Format> Formats(const BaseModel& base);

// The directory that PEFT would save, with random values. Returns the bytes of its tensors.
int64_t WriteFormat(const Format& format, const std::filesystem::path& directory);

}  // namespace lorikeet::bench
