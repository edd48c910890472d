#include "server/inspect.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/inspect_loaded.h"
#include "adapters_cache/normalise.h"
#include "engine/base/status_macros.h"
#include "engine/kernels/cuda/adapter_image.h"
#include "engine/memory/kv_layout.h"
#include "engine/model/base_model_view.h"
#include "engine/model/model_source.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

std::string Megabytes(int64_t bytes) { return absl::StrFormat("%.3f MB", static_cast<double>(bytes) * 1e-6); }

std::string Taken(int64_t own, int64_t shared) {
  std::string text = Megabytes(own);
  if (shared > 0) absl::StrAppend(&text, ", and ", Megabytes(shared), " once for all adapters that have the same");
  return text;
}

class OnModel {
 public:
  OnModel(const RawAdapter& raw, std::shared_ptr<const ModelSource> source)
      : raw_(raw), config_(source->config()), base_(std::move(source)) {}

  absl::StatusOr<std::string> Run() {
    LK_ASSIGN_OR_RETURN(const std::string on_host, OnHost());
    return absl::StrCat(on_host, "on a GPU    ", OnGpu(), "\n");
  }

 private:
  struct Made {
    std::shared_ptr<SharedBlobs> blobs = std::make_shared<SharedBlobs>();
    std::shared_ptr<const Adapter> adapter;
  };

  absl::StatusOr<Made> Make(bool on_host) {
    Made made;
    const NormaliseOptions options{.precision = FactorPrecision::kBF16, .allow_dense = !dense_.empty(),
                                   .on_host = on_host, .blobs = made.blobs.get()};
    auto adapter = Normalise(raw_, base_, options);
    if (absl::IsResourceExhausted(adapter.status()) && dense_.empty()) {
      dense_ = std::string(adapter.status().message());
      return Make(on_host);
    }
    LK_RETURN_IF_ERROR(adapter.status());
    made.adapter = *std::move(adapter);
    return made;
  }

  absl::StatusOr<std::string> OnHost() {
    LK_ASSIGN_OR_RETURN(const Made made, Make(true));
    const double share = config_.experts > 0 ? static_cast<double>(config_.experts_per_token) / config_.experts : 1;
    std::string text = FormatLoaded(InspectLoaded(*made.adapter, base_, share));
    if (!dense_.empty()) absl::StrAppend(&text, "dense       ", dense_, "\n");
    absl::StrAppend(&text, "on the host ", Taken(made.adapter->bytes, made.blobs->bytes()), "\n");
    return text;
  }

  // In pages, with activations of two bytes.
  std::string OnGpu() {
    const auto made = Make(false);
    if (!made.ok()) return absl::StrCat("refused: ", made.status().message());
    const KvLayout kv = KvLayout::Make(config_.layers, config_.kv_heads, config_.head_dim, DType::kBF16);
    std::vector<cuda::ModuleWidths> widths(ModuleCount(config_.layers, config_.experts));
    for (const ModuleId id : base_.modules()) widths[id] = {base_.shape(id).in, base_.shape(id).out};
    const auto plan = [&](const Adapter& adapter) {
      return cuda::PlanImage(adapter, widths, config_.expert_modules(), DType::kBF16, kv.page_bytes());
    };
    const auto own = plan(*made->adapter);
    if (!own.ok()) return absl::StrCat("refused: ", own.status().message());
    int64_t shared = 0;
    if (made->adapter->shared != nullptr) shared = plan(*made->adapter->shared)->size.bytes(kv.page_bytes());
    return Taken(own->size.bytes(kv.page_bytes()), shared);
  }

  const RawAdapter& raw_;
  const ModelConfig& config_;
  const BaseModelView base_;
  std::string dense_;  // what a load without dense deltas says of it; empty: it has none
};

}  // namespace

absl::StatusOr<std::string> InspectOnModel(const fs::path& directory, const fs::path& model) {
  LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAdapterFiles(directory, {}));
  Problems problems;
  const RawAdapter raw = ParseAdapter(std::move(files), &problems);
  LK_RETURN_IF_ERROR(problems.ToStatus());
  LK_ASSIGN_OR_RETURN(std::shared_ptr<const ModelSource> source, ModelSource::Open(model, raw.layer_replication));
  return OnModel(raw, source).Run();
}

}  // namespace lorikeet
