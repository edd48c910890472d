// What an adapter of every kind costs on a GPU: decoding steps of Llama-3.1-8B's shapes, eight rows at 512
// tokens, random weights. Adapters are written as PEFT saves them and loaded as a server does; what PEFT saves
// with whole tables is made in memory. Prints the device bytes of an adapter, the time of a step in which one row is
// of that kind beside seven of others, over that of the same step with a base row in its place, and of a step of
// eight such rows, over that of eight base rows. Kinds that are the same to a step are named behind it.
//   bench_variants FOLDER [LAYERS]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/normalise.h"
#include "bench/device.h"
#include "bench/formats.h"
#include "bench/model_steps.h"
#include "bench/synthetic.h"
#include "engine/base/check.h"
#include "engine/model/base_model_view.h"
#include "tests/support/load_images.h"

namespace lorikeet::bench {
namespace {

namespace fs = std::filesystem;

constexpr int32_t kRows = 8, kContext = 512;
constexpr int64_t kKvBytes = int64_t{4} << 30, kImageBytes = int64_t{16} << 30;

// The rows beside the one that is measured.
constexpr std::string_view kOthers[] = {"LoRA, r16, BF16", "DoRA, r16",  "VeRA, r256",    "IA3, k and v",
                                        "RoAd 1",          "LN tuning", "BEFT, q and v"};

// By kind, those that lie on the device and are computed as it is, at their own ranks.
struct Kin {
  std::string_view kind;
  const char* others;
};
constexpr Kin kKin[] = {
    {"LoRA, r16, BF16",
     "rsLoRA, aLoRA, LoRA+, LoRA-FA, EVA, MiCA, VeLoRA, MonteCLoRA, other inits, QLoRA, DyLoRA, 1LoRA, BD-LoRA, QALoRA, "
     "Poly, PEANuT, converted PiSSA, OLoRA, CorDA"},
    {"DoRA, r16", "QDoRA"},
    {"OLoRA, r16", "unconverted PiSSA, KaSA, OSF, weighted sums: pairs of more ranks"},
    {"Arrow, 8 of r16, BF16", "MoLE; X-LoRA, which takes a step of the base alone as well"},
    {"VeRA, r256", "PVeRA"},
    {"MiSS, r64", "Bone"},
    {"BEFT, q and v", "BitFit, bias=all, lora_bias"},
    {"RoAd 1", "RoAd 2 and 4"},
    {"SHiRA, r16", "SuperTuning, WaveFT without its inverse"},
    {"HiRA, r32, q and v", "FRoD, GLoRA, WaveFT, MiSS bat: a dense delta"},
    {"LN tuning", "LongLoRA's and saved norms"},
    {"prompt tuning, 64", "P-tuning, CPT, multitask prompt tuning"},
    {"prefix tuning, 64", "Cartridge"},
    {"Houlsby, 256 wide", "Pfeiffer, parallel, Compacter, LoRETTA's bottlenecks"},
    {"head of its own", "modules_to_save, tokens of its own"},
    {"1000 embedding rows", "trainable tokens"},
};

struct Variant {
  std::string name;
  std::shared_ptr<const Adapter> adapter;
};

// As a server of two bytes an activation loads it.
std::shared_ptr<const Adapter> Load(const Format& format, const BaseModel& base, const fs::path& directory,
                                    SharedBlobs* blobs) {
  WriteFormat(format, directory);
  auto files = ReadAdapterFiles(directory, {});
  LK_CHECK_MSG(files.ok(), files.status().ToString());
  Problems problems;
  const RawAdapter raw = ParseAdapter(*std::move(files), &problems);
  LK_CHECK_MSG(problems.empty(), problems.ToStatus().ToString());
  auto adapter = Normalise(raw, base, {.precision = FactorPrecision::kBF16, .allow_dense = true,
                                       .on_host = false, .blobs = blobs});
  LK_CHECK_MSG(adapter.ok(), format.name + ": " + adapter.status().ToString());
  fs::remove_all(directory);
  return *std::move(adapter);
}

// Whole tables, all of one block of host memory.
std::vector<Variant> OfTables(const ModelConfig& config) {
  static AlignedBuffer block(2 * int64_t{config.vocab} * config.hidden);
  static std::vector<int32_t> ids(1000);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  auto head = std::make_shared<Adapter>(), embedding = std::make_shared<Adapter>();
  head->modules.resize(ModuleCount(config.layers));
  head->modules.back().rows.rows = {DType::kBF16, config.vocab, block.data()};
  embedding->modules.resize(ModuleCount(config.layers));
  embedding->embedding.rows = {{DType::kBF16, static_cast<int32_t>(ids.size()), block.data()}, ids.data()};
  return {{"head of its own", head}, {"1000 embedding rows", embedding}};
}

// Steps with adapters, which it copies to the device once each.
class Costs {
 public:
  Costs(Backend* backend, Model* model, const KvLayout& layout)
      : backend_(backend), layout_(layout), next_(static_cast<int32_t>(kKvBytes / layout.page_bytes())),
        steps_(backend, model, layout, next_) {}

  // Pages of its image and of what it shares, each copied when it first comes.
  int32_t Place(const std::shared_ptr<const Adapter>& adapter) {
    const int32_t shared = adapter->shared == nullptr ? 0 : Place(adapter->shared);
    const auto [it, is_new] = pages_.try_emplace(adapter->serial, next_);
    if (is_new) next_ = LoadImages(backend_->images(), {&adapter, 1}, next_);
    if (is_new) it->second = next_ - it->second;
    return it->second + shared;
  }

  void SetOthers(std::vector<std::shared_ptr<const Adapter>> others) {
    rows_ = std::move(others);
    rows_.push_back(nullptr);
    LK_CHECK(rows_.size() == kRows);
    beside_others_ = Step(rows_);
    base_ = Step({nullptr});
    std::printf("%s: a step of %d base rows %.3f ms, of seven others and one %.3f ms\n", DeviceName().c_str(), kRows,
                base_, beside_others_);
    std::printf("%-22s %9s %9s %9s %9s %9s\n", "adapter", "MB", "one, ms", "over", "all, ms", "over");
  }

  void Print(const Variant& variant, int32_t pages) {
    rows_.back() = variant.adapter;
    const double one = Step(rows_), all = Step({variant.adapter});
    std::printf("%-22s %9.1f %9.3f %9.3f %9.3f %9.3f", variant.name.c_str(), pages * layout_.page_bytes() * 1e-6, one,
                one - beside_others_, all, all - base_);
    const auto kin = std::ranges::find(kKin, std::string_view(variant.name), &Kin::kind);
    std::printf("%s%s\n", kin == std::end(kKin) ? "" : "  ", kin == std::end(kKin) ? "" : kin->others);
    std::fflush(stdout);
  }

 private:
  double Step(const std::vector<std::shared_ptr<const Adapter>>& adapters) {
    return steps_.Measure(kRows, kContext, 1, adapters) * 1e3;
  }

  Backend* const backend_;
  const KvLayout layout_;
  int32_t next_;  // page
  std::map<uint64_t, int32_t> pages_;  // by serial
  ModelSteps steps_;
  std::vector<std::shared_ptr<const Adapter>> rows_;
  double base_ = 0, beside_others_ = 0;
};

int Run(const fs::path& folder, int32_t layers) {
  ModelConfig shapes = Llama8B();
  shapes.layers = layers;
  shapes.layer_uses_rope.resize(layers, 1);
  shapes.layer_uses_window.resize(layers, 0);
  const auto source = std::make_shared<SyntheticModel>(shapes);
  const ModelConfig& config = source->config();
  auto backend = MakeCudaBackend({.max_rows = 256});
  LK_CHECK_MSG(backend.ok(), backend.status().ToString());
  auto model = Model::Load(source, backend->get(), 256);
  LK_CHECK_MSG(model.ok(), model.status().ToString());
  const KvLayout layout = KvLayout::Make(config.layers, config.kv_heads, config.head_dim, (*backend)->kv_dtype());
  (*backend)->AllocatePages(layout, kKvBytes + kImageBytes);

  const BaseModelView base(source);
  const std::vector<Format> formats = Formats(base);
  SharedBlobs blobs;
  Costs costs(backend->get(), model->get(), layout);
  std::vector<std::shared_ptr<const Adapter>> others;
  for (const std::string_view name : kOthers) {
    const auto format = std::ranges::find(formats, name, &Format::name);
    LK_CHECK(format != formats.end());
    others.push_back(Load(*format, base, folder / "adapter", &blobs));
    costs.Place(others.back());
  }
  costs.SetOthers(std::move(others));
  const auto measure = [&](const Variant& variant) {
    costs.Print(variant, costs.Place(variant.adapter));
  };
  for (const Format& format : formats) measure({format.name, Load(format, base, folder / "adapter", &blobs)});
  for (const Variant& variant : OfTables(config)) measure(variant);
  return 0;
}

}  // namespace
}  // namespace lorikeet::bench

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "bench_variants FOLDER [LAYERS]\n");
    return 1;
  }
  return lorikeet::bench::Run(argv[1], argc > 2 ? std::atoi(argv[2]) : lorikeet::bench::Llama8B().layers);
}
