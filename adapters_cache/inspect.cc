#include "adapters_cache/inspect.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/formats/problems.h"
#include "engine/api/module.h"

namespace lorikeet {
namespace {

constexpr std::string_view kLayers = "model.layers.";

// The layer of "model.layers.N.rest" and rest; no layer for other paths.
std::pair<std::optional<int>, std::string> SplitLayer(const std::string& path) {
  if (!std::string_view(path).starts_with(kLayers)) return {std::nullopt, path};
  const size_t dot = path.find('.', kLayers.size());
  const size_t digits = dot == std::string::npos ? 0 : dot - kLayers.size();
  constexpr size_t kMaxDigits = 4;
  if (digits == 0 || digits > kMaxDigits) return {std::nullopt, path};
  int layer = 0;
  for (size_t i = kLayers.size(); i < dot; ++i) {
    if (path[i] < '0' || path[i] > '9') return {std::nullopt, path};
    layer = layer * 10 + (path[i] - '0');
  }
  return {layer, path.substr(dot + 1)};
}

// "mlp.experts.3.up_proj" -> "mlp.experts.*.up_proj", a router's name as it is; empty for anything
// else below a layer.
std::string ExpertLinear(const std::string& name) {
  std::string_view rest = name;
  const bool old_mixtral = rest.starts_with("block_sparse_moe.");
  if (!old_mixtral && !rest.starts_with("mlp.")) return "";
  rest.remove_prefix(rest.find('.') + 1);
  if (rest == "gate") return name;
  constexpr std::string_view kExperts = "experts.";
  if (!rest.starts_with(kExperts)) return "";
  rest.remove_prefix(kExperts.size());
  const size_t digits = rest.find_first_not_of("0123456789");
  if (digits == 0 || digits == std::string_view::npos || rest[digits] != '.') return "";
  rest.remove_prefix(digits + 1);
  const auto is_rest = [rest](std::string_view linear) { return rest == linear; };
  const std::string_view old_names[] = {"w1", "w2", "w3"};
  const std::string_view names[] = {"gate_proj", "up_proj", "down_proj"};
  if (std::ranges::none_of(old_mixtral ? old_names : names, is_rest)) return "";
  return absl::StrCat(old_mixtral ? "block_sparse_moe." : "mlp.", "experts.*.", std::string(rest));
}

// What a server checks against its base model, as far as the file alone can tell: layers up to the
// highest in the file, and one shape for each kind of linear.
class Inspector {
 public:
  // `prefix` begins the names of its linears.
  Inspector(const RawAdapter& raw, std::string prefix, InspectReport* report)
      : raw_(raw), prefix_(std::move(prefix)), report_(report) {}

  void Run() {
    std::set<int> with_experts;
    for (const auto& [path, module] : raw_.modules) {
      const auto [layer, name] = SplitLayer(path);
      layers_ = std::max(layers_, layer.value_or(-1) + 1);
      if (!layer || ExpertLinear(name).empty()) continue;
      with_experts.insert(*layer);
      known_.insert(path);
    }
    for (ModuleId id = 0; id < ModuleCount(layers_); ++id) {
      const std::string path = ModulePath(id, layers_);
      const bool feed_forward = id % kLinearsPerLayer >= static_cast<int>(Linear::kGate);
      if (feed_forward && with_experts.contains(id / kLinearsPerLayer)) continue;
      known_.insert(path);
      if (raw_.Lacks(path, raw_.Find(path))) missing_.push_back(path);
    }
    const RawModule* table = raw_.Find(kEmbeddingPath);
    if (raw_.Lacks(kEmbeddingPath, table)) missing_.emplace_back(kEmbeddingPath);
    if (table != nullptr && table->has_delta() && raw_.ServesEmbedding(*table)) known_.insert(kEmbeddingPath);
    for (const auto& [path, module] : raw_.modules) AddModule(path, module);
    for (const auto& [path, pair] : raw_.parameters.pairs) AddPair(path, pair);
    for (auto& [name, group] : groups_) report_->groups.push_back(group);
    Refuse("no linear of a served model is called ", unknown_);
    Refuse("target_modules asks for modules that the file has no tensors for: ", missing_);
  }

 private:
  void Refuse(const char* what, const std::vector<std::string>& paths) {
    if (!paths.empty()) report_->refusals.push_back(what + ListNames(paths));
  }

  void AddModule(const std::string& path, const RawModule& module) {
    if (!known_.contains(path)) unknown_.push_back(path);
    AddPair(path, module);
  }

  void AddPair(const std::string& path, const RawModule& module) {
    if (!module.a || !module.b) return;
    const std::vector<int64_t>& a = module.a->view.shape;
    const std::vector<int64_t>& b = module.b->view.shape;
    if (a.size() != 2 || b.size() != 2) return;  // refused already, for its rank
    const std::string in_layer = SplitLayer(path).second;
    const std::string of_expert = ExpertLinear(in_layer);
    const std::string& name = of_expert.empty() ? in_layer : of_expert;
    const auto rank = static_cast<int32_t>(a[0]);
    auto [it, fresh] = groups_.try_emplace(name);
    InspectGroup& group = it->second;
    if (fresh) {
      group = {.module = prefix_ + name,
               .in = static_cast<int32_t>(a[1]),
               .out = static_cast<int32_t>(b[0]),
               .min_rank = rank,
               .max_rank = rank,
               .min_scale = module.scale,
               .max_scale = module.scale};
    }
    ++group.count;
    group.min_rank = std::min(group.min_rank, rank);
    group.max_rank = std::max(group.max_rank, rank);
    group.min_scale = std::min(group.min_scale, module.scale);
    group.max_scale = std::max(group.max_scale, module.scale);
    CheckShape(*module.a, {rank, group.in}, path);
    CheckShape(*module.b, {group.out, rank}, path);
    CheckShape(module.magnitude, {group.out}, path);
    CheckShape(module.lora_bias, {group.out}, path);
  }

  void CheckShape(const std::optional<RawTensor>& tensor, const std::vector<int64_t>& expected,
                  const std::string& path) {
    if (!tensor.has_value()) return;
    if (IsCode(tensor->view.dtype)) {
      report_->refusals.push_back(
          absl::StrCat(tensor->name, " is ", Info(tensor->view.dtype).name, ", not of floats"));
    }
    if (tensor->view.shape == expected) return;
    report_->refusals.push_back(absl::StrCat(tensor->name, " is ", ShapeString(tensor->view.shape),
                                             "; the other tensors of ", path,
                                             " and of its kind ask "
                                             "for ",
                                             ShapeString(expected)));
  }

  const RawAdapter& raw_;
  const std::string prefix_;
  InspectReport* report_;
  int layers_ = 0;
  std::set<std::string> known_;
  std::map<std::string, InspectGroup> groups_;
  std::vector<std::string> unknown_;
  std::vector<std::string> missing_;
};

void AddTensors(const TensorFile& tensors, InspectReport* report) {
  std::set<std::string> dtypes;
  for (const auto& [name, view] : tensors.tensors()) {
    dtypes.insert(Info(view.dtype).name);
    report->parameters += view.elements();
    report->tensor_bytes += static_cast<int64_t>(view.bytes.size());
    const absl::Status finite = CheckFinite(name, view);
    if (!finite.ok()) report->refusals.emplace_back(finite.message());
  }
  report->dtypes = absl::StrJoin(dtypes, " ");
}

std::string Range(int32_t low, int32_t high) {
  return low == high ? absl::StrCat(low) : absl::StrCat(low, "-", high);
}

std::string ScaleRange(float low, float high) {
  return low == high ? absl::StrCat(low) : absl::StrCat(low, "-", high);
}

}  // namespace

InspectReport InspectAdapter(const std::filesystem::path& directory) {
  InspectReport report;
  report.path = directory.string();
  absl::StatusOr<AdapterFiles> files = ReadAdapterFiles(directory, {});
  if (!files.ok()) {
    report.refusals.emplace_back(files.status().message());
    return report;
  }
  Problems problems;
  const TensorFile tensors = files->tensors;
  const RawAdapter raw = ParseAdapter(*std::move(files), &problems);
  report.variant = raw.variant;
  report.base_model = raw.base_model;
  report.version = raw.version;
  report.warnings = raw.warnings;
  for (const absl::Status& problem : problems.list()) {
    report.refusals.emplace_back(problem.message());
  }
  AddTensors(tensors, &report);
  Inspector(raw, "", &report).Run();
  for (size_t e = 0; e < raw.experts.size(); ++e) {
    AddTensors(raw.experts[e].tensors, &report);
    Inspector(raw.experts[e], absl::StrCat(e, "/"), &report).Run();
  }
  return report;
}

std::string FormatReport(const InspectReport& report) {
  std::string text = absl::StrCat("adapter     ", report.path, "\n");
  if (!report.variant.empty()) absl::StrAppend(&text, "variant     ", report.variant, "\n");
  if (!report.base_model.empty()) absl::StrAppend(&text, "base        ", report.base_model, "\n");
  if (!report.version.empty()) {
    absl::StrAppend(&text, "version     ", report.version, "\n", "parameters  ", report.parameters,
                    "\n", "bytes       ", report.tensor_bytes, " (", report.dtypes, ")\n");
  }
  if (!report.groups.empty()) {
    absl::StrAppendFormat(&text, "\n%-20s %8s %8s %8s %10s %s\n", "module", "count", "in", "out",
                          "rank", "scale");
  }
  for (const InspectGroup& group : report.groups) {
    absl::StrAppendFormat(&text, "%-20s %8d %8d %8d %10s %s\n", group.module, group.count, group.in,
                          group.out, Range(group.min_rank, group.max_rank),
                          ScaleRange(group.min_scale, group.max_scale));
  }
  if (!report.groups.empty()) text += "\n";
  for (const std::string& warning : report.warnings) {
    absl::StrAppend(&text, "warning     ", warning, "\n");
  }
  for (const std::string& refusal : report.refusals) {
    absl::StrAppend(&text, "refused     ", refusal, "\n");
  }
  if (report.loadable()) {
    text += "loads       into any base model with these shapes and layers\n";
  }
  return text;
}

}  // namespace lorikeet
