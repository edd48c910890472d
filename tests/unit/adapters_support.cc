#include "tests/unit/adapters_support.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "engine/base/check.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet::testing {
namespace {

namespace fs = std::filesystem;

// Multiples of 1/256 in [-1, 1]: exact in bfloat16 and half.
std::vector<float> RandomValues(int64_t count, std::mt19937& generator) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(int(generator() % 257) - 128) / 128.0f;
  return values;
}

int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (int64_t d : shape) elements *= d;
  return elements;
}

LinearShape ShapeOf(const std::string& path) {
  constexpr int32_t kHidden = 16, kKv = 8, kFeedForward = 24, kVocab = 40;
  if (path == "lm_head") return {kHidden, kVocab};
  if (path.ends_with("k_proj") || path.ends_with("v_proj")) return {kHidden, kKv};
  if (path.ends_with("gate_proj") || path.ends_with("up_proj")) return {kHidden, kFeedForward};
  if (path.ends_with("down_proj")) return {kFeedForward, kHidden};
  return {kHidden, kHidden};
}

}  // namespace

TempDir::TempDir() {
  std::string pattern = (fs::temp_directory_path() / "lorikeet-test-XXXXXX").string();
  LK_CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = fs::canonical(pattern);
}

TempDir::~TempDir() { fs::remove_all(path_); }

TestBase TestBase::Random(int layers) {
  TestBase base;
  base.layers_ = layers;
  std::mt19937 generator(7);
  for (ModuleId id = 0; id < ModuleCount(layers); ++id) {
    const std::string path = ModulePath(id, layers);
    const LinearShape shape = ShapeOf(path);
    base.linears_[path] = {shape, RandomValues(int64_t{shape.in} * shape.out, generator), {}};
  }
  return base;
}

TestBase TestBase::FromFile(const fs::path& safetensors) {
  TestBase base;
  const auto file = ReadSafetensors(safetensors);
  LK_CHECK_MSG(file.ok(), file.status().ToString());
  for (const auto& [name, view] : file->tensors()) {
    std::vector<float> values(view.elements());
    Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
    const size_t dot = name.rfind('.');
    LinearWeights& linear = base.linears_[name.substr(0, dot)];
    if (name.substr(dot) == ".bias") {
      linear.bias = std::move(values);
    } else {
      linear.shape = {static_cast<int32_t>(view.shape[1]), static_cast<int32_t>(view.shape[0])};
      linear.weight = std::move(values);
    }
  }
  base.layers_ = static_cast<int>(base.linears_.size()) / kLinearsPerLayer;
  return base;
}

void TestBase::ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const {
  const LinearWeights& linear = At(id);
  const int64_t in = linear.shape.in;
  std::copy_n(linear.weight.begin() + first_row * in, rows * in, out);
}

bool TestBase::ReadBias(ModuleId id, float* out) const {
  const LinearWeights& linear = At(id);
  if (out != nullptr) std::copy(linear.bias.begin(), linear.bias.end(), out);
  return !linear.bias.empty();
}

void TestBase::Scale(const std::string& path, float factor) {
  for (float& value : linears_.at(path).weight) value *= factor;
}

std::string SafetensorsBytes(const TensorSpecs& tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    for (float value : tensor.values) {
      const uint16_t half = tensor.dtype == DType::kBF16 ? FloatToBF16(value) : FloatToF16(value);
      if (Info(tensor.dtype).block_bytes == sizeof(value)) {
        data.append(reinterpret_cast<const char*>(&value), sizeof(value));
      } else {
        data.append(reinterpret_cast<const char*>(&half), sizeof(half));
      }
    }
    header[name] = {{"dtype", Info(tensor.dtype).name},
                    {"shape", tensor.shape},
                    {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text + data;
}

void WriteFile(const fs::path& path, std::string_view bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  LK_CHECK(file.good());
}

std::string PeftName(std::string_view path, std::string_view parameter) {
  return "base_model.model." + std::string(path) + "." + std::string(parameter);
}

TestAdapter TestAdapter::Lora(const TestBase& base, std::vector<std::string> names, int rank,
                              uint32_t seed) {
  TestAdapter adapter;
  adapter.config = {{"peft_type", "LORA"},    {"task_type", "CAUSAL_LM"}, {"r", rank},
                    {"lora_alpha", 2 * rank}, {"target_modules", names},  {"bias", "none"}};
  std::mt19937 generator(seed);
  for (ModuleId id = 0; id < ModuleCount(base.layers()); ++id) {
    const std::string path = ModulePath(id, base.layers());
    const auto named = [&path](const std::string& name) { return path.ends_with(name); };
    if (std::none_of(names.begin(), names.end(), named)) continue;
    const auto [in, out] = base.shape(id);
    for (const auto& [parameter, shape] :
         {std::pair<const char*, std::vector<int64_t>>{"lora_A.weight", {rank, in}},
          {"lora_B.weight", {out, rank}}}) {
      adapter.tensors[PeftName(path, parameter)] = {DType::kF32, shape,
                                                    RandomValues(Elements(shape), generator)};
    }
  }
  return adapter;
}

void TestAdapter::MakeDora() {
  config["use_dora"] = true;
  TensorSpecs magnitudes;
  for (const auto& [name, tensor] : tensors) {
    const size_t at = name.rfind("lora_B.weight");
    if (at == std::string::npos) continue;
    const int64_t out = tensor.shape[0];
    magnitudes[name.substr(0, at) + "lora_magnitude_vector"] = {
        DType::kF32, {out}, std::vector<float>(out, 1.5f)};
  }
  tensors.merge(magnitudes);
}

void TestAdapter::Write(const fs::path& directory) const {
  WriteFile(directory / "adapter_config.json", config.dump(1));
  WriteFile(directory / "adapter_model.safetensors", SafetensorsBytes(tensors));
}

}  // namespace lorikeet::testing
