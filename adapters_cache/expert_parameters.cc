#include "adapters_cache/expert_parameters.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/problems.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

// A parameter of Transformers' experts: the linears whose outputs it has one after the other.
struct Parameter {
  const char* name;
  std::vector<Linear> linears;
};

std::vector<Parameter> Parameters() {
  return {{"gate_up_proj", {Linear::kGate, Linear::kUp}}, {"down_proj", {Linear::kDown}}};
}

class ExpertsPacker {
 public:
  ExpertsPacker(const RawAdapter& raw, const BaseModel& base, Packer* packer, Adapter* adapter)
      : raw_(raw), base_(base), packer_(packer), adapter_(adapter) {
    for (const auto& [path, pair] : raw.parameters.pairs) unknown_.insert(path);
  }

  absl::Status Run() {
    const std::vector<ModuleId> modules = base_.modules();
    for (int layer = 0; layer < base_.layers() && base_.experts() > 0; ++layer) {
      const ModuleId router = RouterModule(base_.layers(), base_.experts(), layer);
      if (std::find(modules.begin(), modules.end(), router) == modules.end()) continue;
      const std::string block = absl::StrCat("model.layers.", layer, ".mlp.");
      Note(block + "gate.weight", adapter_->modules[router].low_rank.rank > 0);
      for (const Parameter& parameter : Parameters()) {
        const std::string path = absl::StrCat(block, "experts.", parameter.name);
        Note(path, raw_.parameters.pairs.contains(path));
        LK_RETURN_IF_ERROR(Pack(layer, path, parameter));
      }
    }
    // A linear's own weight may be asked for like this too: it is LoRA on the linear.
    for (const ModuleId id : modules) {
      Note(base_.path(id) + ".weight", adapter_->modules[id].low_rank.rank > 0);
    }
    for (const std::string& target : unmatched_) unknown_.insert(target);
    if (!unknown_.empty()) {
      return absl::NotFoundError(absl::StrCat("the base model has no ",
                                              ListNames({unknown_.begin(), unknown_.end()}),
                                              ", which the adapter changes"));
    }
    if (missing_.empty()) return absl::OkStatus();
    return absl::NotFoundError(
        "target_parameters asks for parameters that the file has no tensors for: " +
        ListNames(missing_));
  }

 private:
  // Of a parameter of the base: whether it is asked for, and if so whether the file has it.
  void Note(const std::string& path, bool in_file) {
    if (!raw_.parameters.Target(path)) return;
    std::erase_if(unmatched_, [&](const std::string& target) { return IsNamed(path, target); });
    if (!in_file) missing_.push_back(path);
  }

  absl::Status Pack(int layer, const std::string& path, const Parameter& parameter) {
    const auto it = raw_.parameters.pairs.find(path);
    if (it == raw_.parameters.pairs.end()) return absl::OkStatus();
    unknown_.erase(path);
    const RawModule& pair = it->second;
    if (!pair.a || !pair.b) return absl::OkStatus();  // complained of by the reader
    const int64_t experts = base_.experts();
    const LinearShape shape = base_.shape(Id(layer, 0, parameter.linears[0]));
    const int64_t parts = static_cast<int64_t>(parameter.linears.size());
    const int64_t rank = pair.rank;
    LK_ASSIGN_OR_RETURN(const Matrix2 a, Read(path, *pair.a, {experts * rank, shape.in}));
    LK_ASSIGN_OR_RETURN(const Matrix2 b, Read(path, *pair.b, {parts * shape.out, rank * experts}));
    for (int expert = 0; expert < experts; ++expert) {
      for (int64_t part = 0; part < parts; ++part) {
        const ModuleId id = Id(layer, expert, parameter.linears[part]);
        Lowered lowered;
        lowered.pairs.push_back({Matrix2(rank, shape.in), Matrix2(shape.out, rank)});
        LoweredPair& own = lowered.pairs.back();
        std::copy_n(a.row(expert * rank), rank * shape.in, own.a.values.data());
        for (int64_t o = 0; o < shape.out; ++o) {
          for (int64_t k = 0; k < rank; ++k) {
            own.b.at(o, k) = pair.scale * b.at(part * shape.out + o, k * experts + expert);
          }
        }
        if (!adapter_->modules[id].empty()) {
          return absl::UnimplementedError(base_.path(id) + " is changed both itself and by " + path);
        }
        LK_RETURN_IF_ERROR(
            packer_->Module(base_.path(id), std::move(lowered), &adapter_->modules[id]));
      }
    }
    return absl::OkStatus();
  }

  ModuleId Id(int layer, int expert, Linear linear) const {
    return ExpertModule(base_.layers(), base_.experts(), layer, expert, linear);
  }

  static absl::StatusOr<Matrix2> Read(const std::string& path, const RawTensor& tensor,
                                      const std::vector<int64_t>& shape) {
    if (tensor.view.shape != shape || IsCode(tensor.view.dtype)) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor.name, " is ", Info(tensor.view.dtype).name, " ",
                       ShapeString(tensor.view.shape), "; ", path, " of the base model needs ",
                       ShapeString(shape)));
    }
    LK_RETURN_IF_ERROR(CheckFinite(tensor.name, tensor.view));
    Matrix2 values(shape[0], shape[1]);
    Dequantize(tensor.view.dtype, tensor.view.bytes.data(), tensor.view.elements(),
               values.values.data());
    return values;
  }

  const RawAdapter& raw_;
  const BaseModel& base_;
  Packer* const packer_;
  Adapter* const adapter_;
  std::set<std::string_view> unknown_;
  std::vector<std::string> unmatched_ = raw_.parameters.targets;
  std::vector<std::string> missing_;
};

}  // namespace

absl::Status PackExpertParameters(const RawAdapter& raw, const BaseModel& base, Packer* packer,
                                  Adapter* adapter) {
  return ExpertsPacker(raw, base, packer, adapter).Run();
}

}  // namespace lorikeet
