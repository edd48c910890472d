#include "adapters_cache/inspect_loaded.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace lorikeet {
namespace {

struct Part {
  const char* name;
  double multiply_adds;
  bool there;
};

double Of(const LowRank& pair, int64_t in, int64_t out) {
  const double mixed = pair.rank_mix != nullptr ? static_cast<double>(pair.rank) * pair.rank : 0;
  return static_cast<double>(pair.rank) * static_cast<double>(in + out) + mixed;
}

std::vector<Part> PartsOf(const ModuleDelta& d, LinearShape shape) {
  const double in = shape.in, out = shape.out;
  const KroneckerDelta& k = d.kronecker;
  const double through = static_cast<double>(k.in1) * k.out2;
  const int32_t block = d.input_rotation.block;
  return {
      {"low rank", Of(d.low_rank, shape.in, shape.out), d.low_rank.rank > 0},
      {"gates by prototypes", 0, d.prototypes != nullptr},
      {"output scale", out, d.out_scale != nullptr},
      {"bias", 0, d.bias != nullptr},
      {"input scale", in, block == 1},
      {"input rotation", in * block, block > 1},
      {"outputs scaled", out, d.output_rotation.scale != nullptr && d.output_rotation.cross == nullptr},
      {"output rotation", 2 * out, d.output_rotation.cross != nullptr},
      {"Kronecker", through * k.in2 + through * k.out1, k.w1 != nullptr},
      {"circulant", in * out, d.circulant.block > 0},
      {"sparse", d.sparse.row_begin != nullptr ? static_cast<double>(d.sparse.row_begin[shape.out]) : 0,
       d.sparse.row_begin != nullptr},
      {"dense", in * out, d.dense.data != nullptr},
      {"replaced rows", in * d.rows.rows.rows, d.rows.rows.data != nullptr},
  };
}

// Its numbers as stars.
std::string NameOf(const std::string& path) {
  std::vector<std::string> words = absl::StrSplit(path, '.');
  for (std::string& word : words) {
    if (!word.empty() && word.find_first_not_of("0123456789") == std::string::npos) word = "*";
  }
  return absl::StrJoin(words, ".");
}

class Reporter {
 public:
  Reporter(const Adapter& adapter, const BaseModel& base, double expert_share)
      : adapter_(adapter), base_(base), expert_share_(expert_share) {}

  LoadedReport Run() {
    for (const ModuleId id : base_.modules()) Linear(id);
    Tokens();
    Stream();
    Gates();
    return std::move(report_);
  }

 private:
  double ShareOf(ModuleId id) const {
    const ExpertModules experts{base_.experts() > 0 ? base_.layers() : 0, base_.experts()};
    return experts.contains(id) ? expert_share_ : 1;
  }

  double MultiplyAdds(const ModuleDelta& delta, LinearShape shape) const {
    double sum = 0;
    for (const Part& part : PartsOf(delta, shape)) sum += part.there ? part.multiply_adds : 0;
    return sum;
  }

  void Linear(ModuleId id) {
    const LinearShape shape = base_.shape(id);
    const ModuleDelta& delta = adapter_.module(id);
    const double of_base = ShareOf(id) * shape.in * shape.out;
    report_.of_base += of_base;
    if (delta.empty()) return;
    const std::string name = NameOf(base_.path(id));
    const int32_t rank = delta.low_rank.rank;
    const auto [at, is_new] = group_of_.try_emplace(name, report_.groups.size());
    if (is_new) {
      std::vector<std::string> parts;
      for (const Part& part : PartsOf(delta, shape)) {
        if (part.there) parts.emplace_back(part.name);
      }
      report_.groups.push_back({.module = name, .min_rank = rank, .max_rank = rank, .parts = absl::StrJoin(parts, ", ")});
    }
    LoadedGroup& group = report_.groups[at->second];
    ++group.count;
    group.min_rank = std::min(group.min_rank, rank);
    group.max_rank = std::max(group.max_rank, rank);
    group.of_base += of_base;
    const double own = ShareOf(id) * MultiplyAdds(delta, shape);
    group.multiply_adds += own;
    report_.multiply_adds += own;
  }

  void Note(std::string what, double multiply_adds = 0) {
    report_.beside.push_back(std::move(what));
    report_.multiply_adds += multiply_adds;
  }

  void Tokens() {
    const EmbeddingDelta& e = adapter_.embedding;
    const double hidden = base_.hidden();
    if (adapter_.vocab > 0) Note(absl::StrCat("a vocabulary of ", adapter_.vocab, " tokens, the base's has ", base_.vocab_size()));
    if (e.low_rank.rank > 0) Note(absl::StrCat("the embedding, of rank ", e.low_rank.rank), e.low_rank.rank * hidden);
    if (e.out_scale != nullptr) Note("the embedding's scale", hidden);
    if (e.rows.rows.rows > 0) Note(absl::StrCat(e.rows.rows.rows, " rows of the embedding"));
    const VirtualTokens& v = adapter_.virtual_tokens;
    if (v.count > 0) Note(absl::StrCat(v.count, v.kv != nullptr ? " keys and values" : " virtual tokens", " before every prompt"));
    if (!adapter_.invocation_tokens.empty()) {
      Note(absl::StrCat("nothing before its invocation of ", adapter_.invocation_tokens.size(), " tokens"));
    }
  }

  void Stream() {
    const double hidden = base_.hidden();
    const auto norms = std::ranges::count_if(adapter_.norms, [](const float* norm) { return norm != nullptr; });
    if (norms > 0) Note(absl::StrCat(norms, " norms"));
    double bottlenecks = 0, attended = 0;
    int sites = 0, layers = 0;
    for (const Bottleneck& b : adapter_.bottlenecks) {
      sites += b.width > 0 ? 1 : 0;
      bottlenecks += 2 * b.width * hidden;
    }
    for (const PromptAttention& p : adapter_.prompt_attention) {
      layers += p.count > 0 ? 1 : 0;
      attended += 2 * p.count * static_cast<double>(base_.shape(LayerModule(0, Linear::kQ)).out);
    }
    if (sites > 0) Note(absl::StrCat(sites, " bottlenecks"), bottlenecks);
    if (layers > 0) Note(absl::StrCat("attention to a prompt of its own in ", layers, " layers"), attended);
  }

  void Gates() {
    if (adapter_.gating.experts > 0) {
      double classifier = 0;
      for (const Gating::Layer& layer : adapter_.gating.layers) classifier += static_cast<double>(layer.in) * layer.out;
      Note(absl::StrCat("gates over ", adapter_.gating.experts, " LoRAs, from a pass of the base alone"),
           report_.of_base + classifier);
    }
    if (const int32_t experts = adapter_.prototype_gates.experts; experts > 0) {
      double scores = 0;
      for (const ModuleId id : base_.modules()) {
        if (adapter_.module(id).prototypes != nullptr) scores += static_cast<double>(experts) * base_.shape(id).in;
      }
      Note(absl::StrCat("gates of each linear over ", experts, " LoRAs"), scores);
    }
    const MlpMixture& mixture = adapter_.mlp_mixture;
    if (mixture.chosen == 0) return;
    double mlps = 0;
    for (int layer = 0; layer < base_.layers(); ++layer) {
      for (const enum Linear linear : {Linear::kGate, Linear::kUp, Linear::kDown}) {
        const ModuleId id = LayerModule(layer, linear);
        const LinearShape shape = base_.shape(id);
        mlps += static_cast<double>(shape.in) * shape.out + MultiplyAdds(mixture.experts[0]->module(id), shape);
      }
    }
    Note(absl::StrCat("routers over ", mixture.experts.size(), " LoRAs of MLPs, ", mixture.chosen, " a token"), mixture.chosen * mlps);
  }

  const Adapter& adapter_;
  const BaseModel& base_;
  const double expert_share_;
  LoadedReport report_;
  std::map<std::string, size_t> group_of_;
};

std::string Percent(double part, double whole) { return absl::StrFormat("%.3g %%", 100 * part / whole); }

}  // namespace

LoadedReport InspectLoaded(const Adapter& adapter, const BaseModel& base, double expert_share) {
  return Reporter(adapter, base, expert_share).Run();
}

std::string FormatLoaded(const LoadedReport& report) {
  std::string text;
  if (!report.groups.empty()) {
    text = absl::StrFormat("\n%-40s %6s %10s %10s  %s\n", "linear of the model", "count", "rank", "cost", "parts");
  }
  for (const LoadedGroup& group : report.groups) {
    const std::string rank = group.min_rank == group.max_rank ? absl::StrCat(group.min_rank)
                                                              : absl::StrCat(group.min_rank, "-", group.max_rank);
    absl::StrAppendFormat(&text, "%-40s %6d %10s %10s  %s\n", group.module, group.count, rank,
                          Percent(group.multiply_adds, group.of_base), group.parts);
  }
  text += "\n";
  for (const std::string& what : report.beside) absl::StrAppend(&text, "beside      ", what, "\n");
  absl::StrAppend(&text, "cost        ", Percent(report.multiply_adds, report.of_base),
                  " more multiply-adds a token than the base alone\n");
  return text;
}

}  // namespace lorikeet
