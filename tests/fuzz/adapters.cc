#include "tests/fuzz/adapters.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/normalise.h"
#include "engine/base/check.h"
#include "engine/model/base_model_view.h"
#include "engine/tensor/json.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet::testing {
namespace {

void CheckVector(const float* values, int64_t count) {
  for (int64_t i = 0; values != nullptr && i < count; ++i) LK_CHECK(std::isfinite(values[i]));
}

void CheckModule(const ModuleDelta& delta, LinearShape shape) {
  CheckVector(delta.out_scale, shape.out);
  CheckVector(delta.bias, shape.out);
  CheckVector(delta.prototypes, shape.in);
  if (delta.input_rotation.block) {
    LK_CHECK(shape.in % delta.input_rotation.block == 0);
    CheckVector(delta.input_rotation.r, int64_t{shape.in} * delta.input_rotation.block);
  }
  if (delta.output_rotation.cross) LK_CHECK(shape.out % (2 * delta.output_rotation.half) == 0);
  const KroneckerDelta& kronecker = delta.kronecker;
  if (kronecker.w1) {
    LK_CHECK(kronecker.in1 * kronecker.in2 == shape.in);
    LK_CHECK(kronecker.out1 * kronecker.out2 == shape.out);
  }
  for (int32_t o = 0; delta.sparse.row_begin && o < shape.out; ++o) {
    for (int32_t e = delta.sparse.row_begin[o]; e < delta.sparse.row_begin[o + 1]; ++e) {
      LK_CHECK(delta.sparse.column[e] >= 0 && delta.sparse.column[e] < shape.in);
    }
  }
}

AdapterFiles Golden(const char* name) {
  auto golden = ReadAdapterFiles(std::string("tests/golden/variants/") + name, {});
  LK_CHECK_MSG(golden.ok(), golden.status().ToString());
  return *std::move(golden);
}

// X-LoRA's or Arrow's LoRAs, which are in no file of the input: a golden's.
const std::vector<AdapterFiles>& Experts(bool arrow) {
  static const auto* const of_xlora = new AdapterFiles(Golden("xlora"));
  static const auto* const of_arrow = new AdapterFiles(Golden("arrow"));
  return (arrow ? of_arrow : of_xlora)->experts;
}

void CheckAdapter(const BaseModel& base, const Adapter& adapter) {
  const auto count = static_cast<int>(adapter.modules.size());
  LK_CHECK(count == ModuleCount(base.layers()) ||
           count == ModuleCount(base.layers(), base.experts()));
  for (const ModuleId id : base.modules()) CheckModule(adapter.module(id), base.shape(id));
  for (const auto& expert : adapter.mlp_mixture.experts) CheckAdapter(base, *expert);
}

}  // namespace

void FuzzAdapter(const BaseModel& base, std::string_view config,
                 std::span<const std::byte> safetensors) {
  const auto json = ParseJson(config, "fuzz");
  if (!json.ok() || !json->is_object()) return;
  auto tensors = ParseSafetensors(safetensors, "fuzz");
  if (!tensors.ok()) return;
  AdapterFiles files;
  files.config = nlohmann::ordered_json::parse(config.begin(), config.end());
  files.tensors = TensorFile({}, *std::move(tensors));
  const bool arrow = files.config.contains("arrow_config");
  if (arrow || files.config.value("peft_type", nlohmann::ordered_json()) == "XLORA") files.experts = Experts(arrow);
  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  if (!problems.empty()) {
    LK_CHECK(!problems.ToStatus().message().empty());
    return;
  }
  const auto adapter = Normalise(raw, base, {FactorPrecision::kBF16, true});
  if (!adapter.ok()) {
    LK_CHECK(!adapter.status().message().empty());
    return;
  }
  CheckAdapter(base, **adapter);
}

void FuzzAdapterFiles(std::span<const std::byte> bytes) {
  static const BaseModelView* base = [] {
    auto source = ModelSource::Open("tests/golden/models/llama");
    LK_CHECK_MSG(source.ok(), source.status().ToString());
    return new BaseModelView(std::shared_ptr<const ModelSource>(*std::move(source)));
  }();
  const auto zero = std::find(bytes.begin(), bytes.end(), std::byte{0});
  if (zero == bytes.end()) return;
  const auto config = static_cast<size_t>(zero - bytes.begin());
  FuzzAdapter(*base, {reinterpret_cast<const char*>(bytes.data()), config},
              bytes.subspan(config + 1));
}

}  // namespace lorikeet::testing
