#include "adapters_cache/formats/xlora.h"

#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/settings.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::string_view kKeys =
    "adapters hidden_size enable_softmax enable_softmax_topk layerwise_scalings xlora_depth xlora_size "
    "xlora_dropout_p use_trainable_adapters softmax_temperature top_k_lora scaling_pass_value "
    "global_scaling_weight";

class XLoraReader {
 public:
  XLoraReader(const AdapterFiles& files, RawAdapter* raw, Problems* problems)
      : files_(files), raw_(raw), problems_(problems), settings_(files.config, problems) {}

  void Read() {
    raw_->variant = "xlora";
    WarnOfUnknownKeys(files_.config, kKeys, raw_);
    for (const AdapterFiles& expert : files_.experts) {
      raw_->experts.push_back(ParseAdapter(expert, problems_));
    }
    if (raw_->experts.empty()) problems_->Invalid("adapters names no experts");
    Gating& gating = raw_->gating;
    gating.experts = static_cast<int32_t>(raw_->experts.size());
    gating.softmax = settings_.Flag("enable_softmax", true);
    gating.softmax_of_top = settings_.Flag("enable_softmax_topk", false);
    gating.temperature = static_cast<float>(settings_.Number("softmax_temperature", 1));
    gating.top = static_cast<int32_t>(settings_.Whole("top_k_lora", 0, gating.experts));
    raw_->gates_each_linear = settings_.Flag("layerwise_scalings", false);
    raw_->gates_weight = static_cast<float>(settings_.Number("global_scaling_weight", 1));
    if (!(gating.temperature > 0)) problems_->Invalid("softmax_temperature must be above 0");
    if (settings_.Number("scaling_pass_value", 0) != 0) {
      problems_->Unserved("scaling_pass_value is not 0: the classifier would read states that the "
                          "experts have changed");
    }
    ReadClassifier();
  }

 private:
  // Its linears among ReLUs and, where it was trained with any, dropouts.
  void ReadClassifier() {
    const int64_t depth = settings_.Whole("xlora_depth", 1, kMaxDepth);
    const int step = settings_.Number("xlora_dropout_p", 0.2) > 0 ? 3 : 2;
    std::set<std::string> used;
    std::vector<std::string> missing;
    for (int64_t i = 0; i < depth; ++i) {
      const std::string layer = absl::StrCat("internal_xlora_classifier.layers.", i * step, ".");
      const RawTensor* weight = Find(layer + "weight", &used, &missing);
      const RawTensor* bias = Find(layer + "bias", &used, &missing);
      if (weight != nullptr && bias != nullptr) AddLayer(*weight, *bias);
    }
    if (!missing.empty()) {
      problems_->Invalid("the classifier is not whole, as PEFT 0.21 saves it; the file has no " +
                         ListNames(missing));
    }
    std::vector<std::string> unused;
    for (const auto& [name, view] : files_.tensors.tensors()) {
      if (!used.contains(name)) unused.push_back(name);
    }
    if (unused.empty()) return;
    problems_->Invalid(absl::StrCat(unused.size(), " tensors have no place in this adapter: ",
                                    ListNames(unused)));
  }

  const RawTensor* Find(const std::string& canonical, std::set<std::string>* used,
                        std::vector<std::string>* missing) {
    for (const auto& [name, view] : files_.tensors.tensors()) {
      if (CanonicalName(name) != canonical) continue;
      used->insert(name);
      return &found_.emplace_back(RawTensor{name, view});
    }
    missing->push_back(canonical);
    return nullptr;
  }

  void AddLayer(const RawTensor& weight, const RawTensor& bias) {
    const std::vector<int64_t>& shape = weight.view.shape;
    const auto& layers = raw_->gating.layers;
    const bool chained = shape.size() == 2 && (layers.empty() || shape[1] == layers.back().out);
    if (!chained || bias.view.shape != std::vector<int64_t>{shape[0]} || weight.view.elements() == 0 ||
        weight.view.elements() > INT32_MAX || IsCode(weight.view.dtype) || IsCode(bias.view.dtype)) {
      problems_->Invalid(absl::StrCat(weight.name, " is ", ShapeString(shape), ", ", bias.name, " ",
                                      ShapeString(bias.view.shape),
                                      ": no linear of floats on what comes before it"));
      return;
    }
    for (const RawTensor* tensor : {&weight, &bias}) {
      const absl::Status finite = CheckFinite(tensor->name, tensor->view);
      if (!finite.ok()) problems_->Add(finite);
    }
    raw_->gating.layers.push_back({static_cast<int32_t>(shape[1]), static_cast<int32_t>(shape[0]),
                                   Floats(weight.view), Floats(bias.view)});
  }

  static std::vector<float> Floats(const TensorView& view) {
    std::vector<float> values(view.elements());
    Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
    return values;
  }

  const AdapterFiles& files_;
  RawAdapter* const raw_;
  Problems* const problems_;
  Settings settings_;
  std::deque<RawTensor> found_;
};

}  // namespace

void ParseXLora(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  XLoraReader(files, raw, problems).Read();
}

}  // namespace lorikeet
