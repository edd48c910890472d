// A base model and adapter directories small enough to write down, for tests of adapters_cache.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/api/base_model.h"
#include "engine/base/dtype.h"
#include "nlohmann/json.hpp"

namespace lorikeet::testing {

// Removed with everything in it at the end of the test.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Linears by path, in memory.
class TestBase final : public BaseModel {
 public:
  struct LinearWeights {
    LinearShape shape;
    std::vector<float> weight;  // [out, in]
    std::vector<float> bias;    // [out] or empty
  };

  // hidden 16, feed-forward 24, keys and values 8, vocabulary 40, random weights.
  static TestBase Random(int layers);
  // "M.weight" and "M.bias" tensors in F32.
  static TestBase FromFile(const std::filesystem::path& safetensors);

  int layers() const override { return layers_; }
  int32_t vocab_size() const override { return shape(HeadModule(layers_)).out; }
  LinearShape shape(ModuleId id) const override { return At(id).shape; }
  void ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const override;
  bool ReadBias(ModuleId id, float* out) const override;

  // Multiplies the weights of one linear.
  void Scale(const std::string& path, float factor);

  const LinearWeights& At(ModuleId id) const { return linears_.at(ModulePath(id, layers_)); }

 private:
  int layers_ = 0;
  std::map<std::string, LinearWeights> linears_;
};

struct TensorSpec {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::vector<float> values;
};
using TensorSpecs = std::map<std::string, TensorSpec>;

std::string SafetensorsBytes(const TensorSpecs& tensors);
void WriteFile(const std::filesystem::path& path, std::string_view bytes);

// A PEFT adapter that tests then damage.
struct TestAdapter {
  nlohmann::ordered_json config;
  TensorSpecs tensors;

  // LoRA of `rank` on the linears of `base` called `names`, values from `seed`.
  static TestAdapter Lora(const TestBase& base, std::vector<std::string> names, int rank,
                          uint32_t seed);
  // Adds magnitudes, as use_dora does.
  void MakeDora();

  void Write(const std::filesystem::path& directory) const;
};

// "base_model.model." + path + "." + parameter
std::string PeftName(std::string_view path, std::string_view parameter);

}  // namespace lorikeet::testing
