#include "adapters_cache/formats/peft_prompts.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/formats/peft_targets.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMaxVirtualTokens = 65536;

std::string VariantName(const Json& config) {
  std::string name = config.at("peft_type").get<std::string>();
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

// Takes the tensors that `take` wants; the others must be common parts.
template <typename Take>
void PlaceAll(const AdapterFiles& files, RawAdapter* raw, Problems* problems, const Take& take) {
  CommonParts common(files.config, "", raw, problems);
  std::vector<std::string> unused;
  for (const auto& [name, view] : files.tensors.tensors()) {
    const std::string canonical = CanonicalName(name);
    if (!take(canonical, RawTensor{name, view}) && !common.Place(canonical, name, view)) {
      unused.push_back(name);
    }
  }
  if (!unused.empty()) {
    problems->Invalid(absl::StrCat(unused.size(), " tensors have no place in this adapter: ",
                                   ListNames(unused)));
  }
}

absl::StatusOr<std::vector<float>> Values(const RawAdapter& raw, std::string_view name,
                                          const std::vector<int64_t>& shape) {
  const auto it = raw.shared.find(name);
  if (it == raw.shared.end()) {
    return absl::InvalidArgumentError("the file has no tensor " + std::string(name));
  }
  const RawTensor& tensor = it->second;
  if (tensor.view.shape != shape || IsCode(tensor.view.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(tensor.name, " is ",
                                                   ShapeString(tensor.view.shape),
                                                   "; the base model needs ", ShapeString(shape)));
  }
  LK_RETURN_IF_ERROR(CheckFinite(tensor.name, tensor.view));
  std::vector<float> values(tensor.view.elements());
  Dequantize(tensor.view.dtype, tensor.view.bytes.data(), tensor.view.elements(), values.data());
  return values;
}

const float* Keep(const std::vector<float>& values, Adapter* adapter) {
  auto block = std::make_shared<AlignedBuffer>(values.size() * sizeof(float));
  std::memcpy(block->data(), values.data(), values.size() * sizeof(float));
  adapter->bytes += static_cast<int64_t>(block->size());
  adapter->blocks.push_back(block);
  return block->as<float>();
}

// Rows of prompt_embeddings.
absl::StatusOr<int64_t> VirtualCount(const RawAdapter& raw) {
  const auto it = raw.shared.find("prompt_embeddings");
  if (it == raw.shared.end()) return absl::InvalidArgumentError("the file has no prompt_embeddings");
  const std::vector<int64_t>& shape = it->second.view.shape;
  if (shape.size() == 2 && shape[0] >= 1 && shape[0] <= kMaxVirtualTokens) return shape[0];
  return absl::InvalidArgumentError(
      absl::StrCat("prompt_embeddings is ", ShapeString(shape), "; 1 to ", kMaxVirtualTokens,
                   " rows are expected"));
}

absl::Status LowerPromptTuning(const RawAdapter& raw, const BaseModel& base, Adapter* adapter) {
  LK_ASSIGN_OR_RETURN(const int64_t n, VirtualCount(raw));
  LK_ASSIGN_OR_RETURN(const auto rows, Values(raw, "prompt_embeddings", {n, base.hidden()}));
  adapter->virtual_tokens = {static_cast<int32_t>(n), Keep(rows, adapter), nullptr};
  return absl::OkStatus();
}

absl::Status LowerMultitaskPrompt(const RawAdapter& raw, const BaseModel& base, Adapter* adapter) {
  LK_ASSIGN_OR_RETURN(const int64_t n, VirtualCount(raw));
  LK_ASSIGN_OR_RETURN(auto rows, Values(raw, "prompt_embeddings", {n, base.hidden()}));
  const auto columns = raw.shared.find("prefix_task_cols");
  if (columns == raw.shared.end() || columns->second.view.shape.size() != 3) {
    return absl::InvalidArgumentError("the file has no prefix_task_cols of three dimensions");
  }
  const int64_t tasks = columns->second.view.shape[0], ranks = columns->second.view.shape[2];
  LK_ASSIGN_OR_RETURN(const int64_t task, TaskOf(raw.config, tasks));
  LK_ASSIGN_OR_RETURN(const auto cols, Values(raw, "prefix_task_cols", {tasks, n, ranks}));
  LK_ASSIGN_OR_RETURN(const auto factors, Values(raw, "prefix_task_rows", {tasks, ranks, base.hidden()}));
  std::vector<float> of_task(rows.size());
  AddProduct(1, &cols[task * n * ranks], &factors[task * ranks * base.hidden()], {n, ranks, base.hidden()}, of_task.data());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] *= of_task[i];
  adapter->virtual_tokens = {static_cast<int32_t>(n), Keep(rows, adapter), nullptr};
  return absl::OkStatus();
}

// [n, layers, 2, kv] as stored to [layers, 2, n, kv].
absl::Status LowerPrefixTuning(const RawAdapter& raw, const BaseModel& base, Adapter* adapter) {
  const int64_t kv = base.shape(LayerModule(0, Linear::kK)).out;
  const int64_t parts = 2 * int64_t{base.layers()};
  LK_ASSIGN_OR_RETURN(const int64_t n, VirtualCount(raw));
  LK_ASSIGN_OR_RETURN(const auto stored, Values(raw, "prompt_embeddings", {n, parts * kv}));
  std::vector<float> turned(stored.size());
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t p = 0; p < parts; ++p) {
      std::copy_n(&stored[(t * parts + p) * kv], kv, &turned[(p * n + t) * kv]);
    }
  }
  adapter->virtual_tokens = {static_cast<int32_t>(n), nullptr, Keep(turned, adapter)};
  return absl::OkStatus();
}

// Prompt rows through a layer's k_proj or v_proj, bias included.
std::vector<float> Project(const BaseModel& base, ModuleId id, const Matrix2& rows) {
  const auto [in, out] = base.shape(id);
  Matrix2 weight(out, in);
  base.ReadRows(id, 0, out, weight.values.data());
  Matrix2 projected = MultiplyTransposed(rows, weight);
  std::vector<float> bias(out);
  if (base.ReadBias(id, bias.data())) {
    for (int64_t r = 0; r < projected.rows; ++r) {
      for (int32_t o = 0; o < out; ++o) projected.at(r, o) += bias[o];
    }
  }
  return std::move(projected.values);
}

absl::Status LowerAdaptionPrompt(const RawAdapter& raw, const BaseModel& base, Adapter* adapter) {
  std::vector<float> bias(base.hidden());
  if (base.ReadBias(LayerModule(0, Linear::kO), bias.data())) {
    return absl::UnimplementedError("an adaption prompt over a base whose o_proj has a bias is not "
                                    "served: PEFT adds that bias twice");
  }
  adapter->prompt_attention.resize(base.layers());
  size_t used = 0;
  for (int layer = 0; layer < base.layers(); ++layer) {
    const std::string path = absl::StrCat("model.layers.", layer, ".self_attn.");
    const auto prompt = raw.shared.find(path + "adaption_prompt");
    if (prompt == raw.shared.end()) continue;
    const std::vector<int64_t>& shape = prompt->second.view.shape;
    if (shape.size() != 3 || shape[1] < 1 || shape[1] > kMaxVirtualTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat(prompt->second.name, " is ", ShapeString(shape)));
    }
    LK_ASSIGN_OR_RETURN(auto values,
                        Values(raw, path + "adaption_prompt", {1, shape[1], base.hidden()}));
    LK_ASSIGN_OR_RETURN(const auto gate, Values(raw, path + "adaption_gate", {1}));
    const Matrix2 rows(shape[1], base.hidden(), std::move(values));
    const auto project = [&](Linear linear) {
      return Keep(Project(base, LayerModule(layer, linear), rows), adapter);
    };
    adapter->prompt_attention[layer] = {static_cast<int32_t>(shape[1]), gate[0],
                                        project(Linear::kK), project(Linear::kV)};
    used += 2;
  }
  if (used == raw.shared.size() && used > 0) return absl::OkStatus();
  return absl::NotFoundError("the file holds adaption prompts of layers that the base lacks, or none");
}

bool TakePrompt(RawAdapter* raw, const std::string& canonical, const RawTensor& tensor) {
  return canonical == "prompt_embeddings" && raw->shared.emplace(canonical, tensor).second;
}

}  // namespace

void ParsePromptTuning(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = VariantName(files.config);
  raw->lower_model = LowerPromptTuning;
  WarnOfUnknownKeys(files.config,
                    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
                    "num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
                    "tokenizer_kwargs encoder_reparameterization_type encoder_hidden_size "
                    "encoder_num_layers encoder_dropout cpt_token_ids cpt_mask cpt_tokens_type_mask "
                    "opt_weighted_loss_type opt_loss_decay_factor opt_projection_epsilon "
                    "opt_projection_format_epsilon init_weights num_virtual_tokens",
                    raw);
  PlaceAll(files, raw, problems, [raw](const std::string& canonical, const RawTensor& tensor) {
    return TakePrompt(raw, canonical, tensor);
  });
}

// Multitask prompt tuning (Wang et al. 2023): rows of all tasks, times those of the one that task_id names.
void ParseMultitaskPrompt(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = VariantName(files.config);
  raw->lower_model = LowerMultitaskPrompt;
  WarnOfUnknownKeys(files.config,
                    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
                    "prompt_tuning_init prompt_tuning_init_text prompt_tuning_init_state_dict_path "
                    "prompt_tuning_init_task tokenizer_name_or_path tokenizer_kwargs num_ranks num_tasks task_id",
                    raw);
  PlaceAll(files, raw, problems, [raw](const std::string& canonical, const RawTensor& tensor) {
    const bool ours = canonical == "prompt_embeddings" || canonical == "prefix_task_cols" || canonical == "prefix_task_rows";
    return ours && raw->shared.emplace(canonical, tensor).second;
  });
}

void ParsePrefixTuning(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  ParsePromptTuning(files, raw, problems);
  raw->lower_model = LowerPrefixTuning;
  std::erase_if(raw->warnings, [](const std::string& warning) {
    return warning.find("'prefix_projection'") != std::string::npos ||
           warning.find("'num_frozen_tokens'") != std::string::npos;
  });
}

void ParseAdaptionPrompt(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = VariantName(files.config);
  raw->lower_model = LowerAdaptionPrompt;
  WarnOfUnknownKeys(files.config, "adapter_len adapter_layers", raw);
  PlaceAll(files, raw, problems, [raw](const std::string& canonical, const RawTensor& tensor) {
    const bool ours =
        canonical.ends_with(".adaption_prompt") || canonical.ends_with(".adaption_gate");
    return ours && raw->shared.emplace(canonical, tensor).second;
  });
}

// LN tuning (Zhao et al. 2023): norms as they are after training.
void ParseLnTuning(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = VariantName(files.config);
  WarnOfUnknownKeys(files.config, "", raw);
  PlaceAll(files, raw, problems, [raw](std::string canonical, const RawTensor& tensor) {
    constexpr std::string_view kInfix = ".ln_tuning_layers";
    const size_t at = canonical.find(kInfix);
    if (at == std::string::npos) return false;
    canonical.erase(at, kInfix.size());
    return raw->parts.saved.emplace(canonical, tensor).second;
  });
  if (raw->parts.saved.empty()) problems->Invalid("the file holds no ln_tuning_layers");
  auto targets = PeftTargets::Parse(files.config, problems);
  if (!targets.stated()) return;
  raw->parts.saves = [targets = std::move(targets)](std::string_view path) { return targets.Match(path); };
}

// Trainable tokens: new rows of the embedding, under CommonParts' names.
void ParseTrainableTokens(const AdapterFiles& files, RawAdapter* raw, Problems* problems) {
  raw->variant = VariantName(files.config);
  WarnOfUnknownKeys(files.config, "token_indices init_weights", raw);
  Json config = files.config;
  config["trainable_token_indices"] = config.contains("token_indices") ? config["token_indices"] : Json();
  if (const Json& tables = config["target_modules"]; tables.is_array() && !tables.empty()) {
    Json of_tables = Json::object();
    for (const Json& table : tables) {
      if (table.is_string()) of_tables[table.get<std::string>()] = config["token_indices"];
    }
    config["trainable_token_indices"] = std::move(of_tables);
  }
  AdapterFiles renamed = files;
  renamed.config = std::move(config);
  PlaceAll(renamed, raw, problems, [](const std::string&, const RawTensor&) { return false; });
  if (raw->parts.token_rows.empty()) problems->Invalid("the file holds no trainable_tokens_delta");
}

}  // namespace lorikeet
