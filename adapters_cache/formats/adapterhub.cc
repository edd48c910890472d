#include "adapters_cache/formats/adapterhub.h"

#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/formats/tensor_train.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

// Settings that change what a bottleneck computes and are served at one value alone.
struct Fixed {
  const char* key;
  bool value;
};
constexpr Fixed kFixed[] = {
    {"shared_phm_rule", true}, {"factorized_phm_rule", false}, {"shared_W_phm", false},
    {"factorized_phm_W", true}, {"phm_bias", true},          {"ln_before", false},
    {"ln_after", false},
    {"use_gating", false},     {"cross_adapter", false},     {"original_ln_after", true},
    {"residual_before_ln", true}, {"adapter_residual_before_ln", false},
};

constexpr std::pair<std::string_view, Activation> kActivations[] = {
    {"swish", Activation::kSilu}, {"silu", Activation::kSilu},       {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},  {"gelu_new", Activation::kGeluTanh}, {"tanh", Activation::kTanh},
    {"sigmoid", Activation::kSigmoid}, {"linear", Activation::kIdentity},
};

bool Flag(const Json& config, const char* key, bool fallback) {
  const auto it = config.find(key);
  return it != config.end() && it->is_boolean() ? it->get<bool>() : fallback;
}

// The activation, or nullopt after reporting.
const Activation* FindActivation(const Json& config) {
  const auto it = config.find("non_linearity");
  if (it == config.end() || !it->is_string()) return nullptr;
  for (const auto& [name, activation] : kActivations) {
    if (*it == std::string(name)) return &activation;
  }
  return nullptr;
}

void CheckConfig(const Json& config, Problems* problems) {
  for (const Fixed& fixed : kFixed) {
    if (Flag(config, fixed.key, fixed.value) != fixed.value) {
      problems->Unserved(absl::StrCat(fixed.key, " is ", fixed.value ? "false" : "true",
                                      ", which is not served"));
    }
  }
  if (config.contains("inv_adapter") && IsSet(config["inv_adapter"])) {
    problems->Unserved("inv_adapter: invertible adapters are not served");
  }
  if (FindActivation(config) == nullptr) {
    problems->Unserved("non_linearity " +
                       (config.contains("non_linearity") ? config["non_linearity"].dump() : "null") +
                       " is unknown");
  }
  const auto scaling = config.find("scaling");
  if (scaling != config.end() && !scaling->is_number()) {
    problems->Unserved("scaling is " + scaling->dump() + "; a number is served");
  }
}

class BottleneckPacker {
 public:
  BottleneckPacker(const RawAdapter& raw, const BaseModel& base, Adapter* adapter)
      : raw_(raw), base_(base), adapter_(adapter), config_(raw.config.at("config")) {}

  absl::Status Run() {
    adapter_->bottlenecks.resize(2 * base_.layers());
    for (int layer = 0; layer < base_.layers(); ++layer) {
      LK_RETURN_IF_ERROR(Site(layer, false, "attention_adapters"));
      LK_RETURN_IF_ERROR(Site(layer, true, "output_adapters"));
    }
    std::vector<std::string> unused;
    for (const auto& [name, tensor] : raw_.shared) {
      if (!used_.contains(name)) unused.push_back(tensor.name);
    }
    if (unused.empty()) return absl::OkStatus();
    return absl::NotFoundError(
        absl::StrCat("the base model has no place for ", ListNames(unused)));
  }

 private:
  absl::Status Site(int layer, bool output, const char* site) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".", site, ".");
    const char* bias = hypercomplex_ ? "b" : "bias";
    const auto down_bias = raw_.shared.find(absl::StrCat(prefix, "adapter_down.0.", bias));
    if (down_bias == raw_.shared.end()) return absl::OkStatus();
    const int64_t hidden = base_.hidden();
    const int64_t width = down_bias->second.view.elements();
    if (width < 1 || width > Limits::kMaxAdapterRank) {
      return absl::InvalidArgumentError(absl::StrCat(
          down_bias->second.name, " has width ", width, "; 1 to ", Limits::kMaxAdapterRank));
    }
    Bottleneck& bottleneck = adapter_->bottlenecks[NormIndex(layer, output)];
    bottleneck.width = static_cast<int32_t>(width);
    bottleneck.activation = *FindActivation(config_);
    bottleneck.scale = config_.contains("scaling") ? config_["scaling"].get<float>() : 1.0f;
    bottleneck.input = Flag(config_, "is_parallel", false) ? Bottleneck::Input::kResidual
                       : Flag(config_, "original_ln_before", false) ? Bottleneck::Input::kSum
                                                                    : Bottleneck::Input::kOutput;
    LK_ASSIGN_OR_RETURN(bottleneck.down, TakeWeight(prefix + "adapter_down.0.", width, hidden));
    LK_ASSIGN_OR_RETURN(bottleneck.up, TakeWeight(prefix + "adapter_up.", hidden, width));
    LK_ASSIGN_OR_RETURN(const auto d, Read(absl::StrCat(prefix, "adapter_down.0.", bias), {width}));
    LK_ASSIGN_OR_RETURN(const auto u, Read(absl::StrCat(prefix, "adapter_up.", bias), {hidden}));
    bottleneck.down_bias = Keep(d);
    bottleneck.up_bias = Keep(u);
    return absl::OkStatus();
  }

  // [out, in]
  absl::StatusOr<const float*> TakeWeight(const std::string& prefix, int64_t out, int64_t in) {
    if (hypercomplex_) return TakeHypercomplex(prefix, out, in);
    if (raw_.shared.contains(prefix + "cores.0")) return TakeTrain(prefix, out, in);
    LK_ASSIGN_OR_RETURN(const std::vector<float> weight, Read(prefix + "weight", {out, in}));
    return Keep(weight);
  }

  // LoRETTA (Yang et al. 2024): a tensor train from inputs to outputs.
  absl::StatusOr<const float*> TakeTrain(const std::string& prefix, int64_t out, int64_t in) {
    std::vector<TrainCore> cores;
    const auto core = [&] { return absl::StrCat(prefix, "cores.", cores.size()); };
    for (auto it = raw_.shared.find(core()); it != raw_.shared.end(); it = raw_.shared.find(core())) {
      const std::vector<int64_t>& shape = it->second.view.shape;
      if (shape.size() != 3) {
        return absl::InvalidArgumentError(
            absl::StrCat(it->second.name, " is ", ShapeString(shape), "; a core has three dimensions"));
      }
      LK_ASSIGN_OR_RETURN(auto values, Read(core(), shape));
      cores.push_back({shape, std::move(values)});
    }
    const absl::StatusOr<Matrix2> weight = ContractTrain(cores, in, out);
    if (!weight.ok()) return absl::InvalidArgumentError(absl::StrCat(prefix, "cores: ", weight.status().message()));
    return Keep(Transpose(*weight).values);
  }

  // Compacter (Karimi Mahabadi et al. 2021): Σ_j rule_j ⊗ (left_j · right_j) from inputs to outputs,
  // the rules shared by all layers.
  absl::StatusOr<const float*> TakeHypercomplex(const std::string& prefix, int64_t out, int64_t in) {
    const auto found = raw_.shared.find("phm_rule");
    if (found == raw_.shared.end()) return absl::InvalidArgumentError("the file has no phm_rule");
    const int64_t k = found->second.view.shape.empty() ? 0 : found->second.view.shape[0];
    if (k < 1 || in % k || out % k) {
      return absl::InvalidArgumentError(absl::StrCat(
          found->second.name, ": ", k, " rules do not divide the widths ", in, " and ", out));
    }
    const int64_t rows = in / k, columns = out / k;
    LK_ASSIGN_OR_RETURN(const auto rules, Read("phm_rule", {k, k, k}));
    LK_ASSIGN_OR_RETURN(const auto left, Read(prefix + "W_left", {k, rows, 1}));
    LK_ASSIGN_OR_RETURN(const auto right, Read(prefix + "W_right", {k, 1, columns}));
    std::vector<float> weight(out * in);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j) {
          sum += double{rules[(j * k + i / rows) * k + o / columns]} * left[j * rows + i % rows] *
                 right[j * columns + o % columns];
        }
        weight[o * in + i] = static_cast<float>(sum);
      }
    }
    return Keep(weight);
  }

  absl::StatusOr<std::vector<float>> Read(const std::string& name, const std::vector<int64_t>& shape) {
    const auto it = raw_.shared.find(name);
    if (it == raw_.shared.end()) return absl::InvalidArgumentError("the file has no " + name);
    const TensorView& view = it->second.view;
    if (view.shape != shape || IsCode(view.dtype)) {
      return absl::InvalidArgumentError(absl::StrCat(it->second.name, " is ", Info(view.dtype).name,
                                                     " ", ShapeString(view.shape), "; needed are ",
                                                     ShapeString(shape)));
    }
    LK_RETURN_IF_ERROR(CheckFinite(it->second.name, view));
    std::vector<float> values(view.elements());
    Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
    used_.insert(name);
    return values;
  }

  const float* Keep(const std::vector<float>& values) {
    auto block = std::make_shared<AlignedBuffer>(values.size() * sizeof(float));
    std::copy(values.begin(), values.end(), block->as<float>());
    adapter_->bytes += static_cast<int64_t>(block->size());
    adapter_->blocks.push_back(std::move(block));
    return adapter_->blocks.back()->as<float>();
  }

  const RawAdapter& raw_;
  const BaseModel& base_;
  Adapter* const adapter_;
  const Json& config_;
  const bool hypercomplex_ = Flag(config_, "phm_layer", false);
  std::set<std::string> used_;
};

absl::Status LowerBottlenecks(const RawAdapter& raw, const BaseModel& base, Adapter* adapter) {
  return BottleneckPacker(raw, base, adapter).Run();
}

}  // namespace

bool IsAdapterHub(const Json& config) {
  return !config.contains("peft_type") && config.contains("hidden_size") &&
         config.contains("config");
}

void ParseAdapterHub(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = "bottleneck";
  raw->lower_model = LowerBottlenecks;
  const Json& config = files.config["config"];
  if (!config.is_object()) return problems->Invalid("config is not an object");
  if (config.contains("architecture") && IsSet(config["architecture"])) {
    return problems->Unserved("AdapterHub's " + config["architecture"].dump() +
                              " is not served; its bottlenecks are. Convert it to PEFT's format");
  }
  CheckConfig(config, problems);
  // "model.layers.0.output_adapters.adapters.NAME.adapter_up.weight" without NAME.
  constexpr std::string_view kInfix = ".adapters.";
  std::vector<std::string> unused;
  for (const auto& [name, view] : files.tensors.tensors()) {
    if (name.find("shared_parameters.") != std::string::npos && name.ends_with(".phm_rule")) {
      if (!raw->shared.emplace("phm_rule", RawTensor{name, view}).second) unused.push_back(name);
      continue;
    }
    const size_t at = name.find(kInfix);
    const size_t end = at == std::string::npos ? at : name.find(".adapter_", at + kInfix.size());
    if (end == std::string::npos) {
      unused.push_back(name);
      continue;
    }
    std::string canonical = name;
    canonical.erase(at, end - at);
    if (!raw->shared.emplace(canonical, RawTensor{name, view}).second) unused.push_back(name);
  }
  if (!unused.empty()) {
    problems->Invalid(absl::StrCat(unused.size(), " tensors have no place in this adapter: ",
                                   ListNames(unused)));
  }
  if (raw->shared.empty() && problems->empty()) problems->Invalid("the file holds no bottlenecks");
}

}  // namespace lorikeet
