// The variants' goldens (tests/golden/golden_variants.py makes them) and an engine that serves them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapters_cache/mixer.h"
#include "adapters_cache/registry.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "engine/runner/model_runner.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_device.h"

namespace lorikeet {

inline const std::filesystem::path kGoldenRoot = "tests/golden";

struct VariantPrompt {
  std::vector<int32_t> tokens;
  std::vector<int32_t> greedy;
  std::vector<std::vector<std::pair<int32_t, double>>> top;  // [steps][8], best first
};

struct VariantCase {
  std::string name;
  std::string base;  // with the layers it is stacked of, if it is: "llama [[0,2],[1,3]]"
  std::vector<WeightedAdapter> adapters;  // itself, or the terms of a mixture
  std::vector<VariantPrompt> prompts;

  bool mixture() const { return adapters[0].name != name; }
};

inline std::vector<VariantCase> LoadVariantCases() {
  std::ifstream file(kGoldenRoot / "variants" / "cases.json");
  LK_CHECK_MSG(file.good(), "run from the source root");
  std::vector<VariantCase> cases;
  for (const nlohmann::json& item : nlohmann::json::parse(file)) {
    VariantCase c{item["name"], item["base"], {}, {}};
    if (item.contains("adapters")) {
      for (const auto& [name, weight] : item["adapters"].items()) c.adapters.push_back({name, weight});
    } else {
      c.adapters.push_back({c.name, 1});
    }
    for (const nlohmann::json& p : item["prompts"]) {
      c.prompts.push_back({p["prompt"].get<std::vector<int32_t>>(),
                           p["greedy"].get<std::vector<int32_t>>(),
                           p["logprobs"].get<decltype(VariantPrompt::top)>()});
    }
    cases.push_back(std::move(c));
  }
  return cases;
}

// A case's base without the layers it is stacked of.
inline std::string ModelOf(const std::string& base) { return base.substr(0, base.find(" [")); }

// A GPU computes of experts no more than pairs, output scales and biases.
inline bool RunsOnTestDevice(const VariantCase& c) {
  const bool structured = c.name == "experts_ia3" || c.name == "experts_lokr";
  return !structured || kTestDevice == std::string("cpu");
}

// A base model with its engine and registry.
class VariantServer {
 public:
  VariantServer(const std::string& base, const RunnerOptions& options, StatsSink* stats = nullptr) {
    const std::string model = ModelOf(base);
    const auto replication = ParseLayerReplication(base.substr(model.size()));
    LK_CHECK_MSG(replication.ok(), replication.status().ToString());
    auto source = ModelSource::Open(kGoldenRoot / "models" / model, *replication);
    LK_CHECK_MSG(source.ok(), source.status().ToString());
    auto runner = ModelRunner::Create(std::shared_ptr<const ModelSource>(*std::move(source)), options);
    LK_CHECK_MSG(runner.ok(), runner.status().ToString());
    runner_ = *std::move(runner);
    auto registry = AdapterRegistry::Create(
        runner_->base_model(), {.base_name = "base", .allowed_roots = {}, .allow_dense = true,
                                 .on_host = runner_->images() == nullptr});
    LK_CHECK_MSG(registry.ok(), registry.status().ToString());
    registry_ = *std::move(registry);
    mixer_ = std::make_unique<AdapterMixer>(runner_->base_model(), registry_.get());
    EngineOptions engine{.kv = runner_->kv(), .pages = runner_->pages()};
    engine.limits.max_context_tokens = 64;
    engine.limits.max_running_requests = 256;
    engine.vocab = runner_->base_model().vocab_size();
    auto started = Engine::Start(engine, runner_.get(), &clock_, stats);
    LK_CHECK_MSG(started.ok(), started.status().ToString());
    engine_ = *std::move(started);
  }

  absl::StatusOr<AdapterInfo> Load(const std::string& name) {
    return Load(name, kGoldenRoot / "variants" / name);
  }
  absl::StatusOr<AdapterInfo> Load(const std::string& name, const std::filesystem::path& directory) {
    return registry_->Load(name, std::filesystem::absolute(directory),
                           AdapterRegistry::Origin::kOperator);
  }

  // Of what Load has loaded; none: the base.
  AdapterLease Lease(const std::vector<WeightedAdapter>& adapters) {
    if (adapters.empty()) return AdapterLease();
    // All of them are in host memory, so that the lease comes at once.
    absl::StatusOr<AdapterLease> lease = absl::UnavailableError("still to be read");
    mixer_->AcquireAsync(adapters, [&lease](auto acquired) { lease = std::move(acquired); });
    LK_CHECK_MSG(lease.ok(), lease.status().ToString());
    return *std::move(lease);
  }

  Engine* engine() { return engine_.get(); }
  const BaseModel& base() const { return runner_->base_model(); }

 private:
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<AdapterRegistry> registry_;
  std::unique_ptr<AdapterMixer> mixer_;
  SteadyClock clock_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace lorikeet
