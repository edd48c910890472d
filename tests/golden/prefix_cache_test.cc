// A real model behind the engine: answers and distributions are the same whether a prompt's
// beginning was computed for the request or for an earlier one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "adapters_cache/registry.h"
#include "engine/engine.h"
#include "engine/model/model_source.h"
#include "engine/runner/model_runner.h"

namespace lorikeet {
namespace {

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  int32_t cached_tokens = 0;
};

class PrefixCacheModel : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    auto source = ModelSource::Open("tests/golden/models/llama");
    ASSERT_TRUE(source.ok()) << source.status();
    source_ = *std::move(source);
    RunnerOptions options;
    options.device = "cpu";
    options.precision = GetParam();
    options.threads = 2;
    options.kv_bytes = 8 << 20;
    options.limits = limits_;
    auto runner = ModelRunner::Create(source_, options);
    ASSERT_TRUE(runner.ok()) << runner.status();
    runner_ = *std::move(runner);
    auto registry = AdapterRegistry::Create(runner_->base_model(), {.base_name = "llama"});
    ASSERT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
    for (const char* name : {"lora", "dora"}) {
      const auto info = registry_->Load(name, std::string("tests/golden/adapters/llama/") + name,
                                        AdapterRegistry::Origin::kOperator);
      ASSERT_TRUE(info.ok()) << info.status();
    }
  }

  std::unique_ptr<Engine> Start(bool prefix_cache) {
    EngineOptions options;
    options.limits = limits_;
    options.limits.max_context_tokens = 200;
    options.kv = runner_->kv();
    options.pages = runner_->pages();
    options.prefix_cache = prefix_cache;
    options.vocab = source_->config().vocab;
    auto engine = Engine::Start(options, runner_.get(), &clock_, nullptr);
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  Answer Ask(Engine* engine, const std::vector<int32_t>& prompt, const std::string& adapter) {
    Request request;
    request.prompt = prompt;
    request.sampling.temperature = 0;
    request.sampling.top_logprobs = 0;
    request.max_new_tokens = 12;
    request.ignore_eos = true;
    if (!adapter.empty()) request.adapter = *registry_->Acquire(adapter);
    std::mutex mutex;
    std::condition_variable rung;
    auto sink = std::make_shared<TokenSink>(request.max_new_tokens + 2, [&] {
      std::lock_guard lock(mutex);
      rung.notify_one();
    });
    EXPECT_TRUE(engine->Submit(request, sink).ok());
    Answer answer;
    for (TokenEvent event; event.kind != TokenEvent::Kind::kFinished;) {
      std::unique_lock lock(mutex);
      rung.wait(lock, [&] { return sink->Pop(&event); });
      answer.cached_tokens = event.cached_tokens;
      if (event.kind != TokenEvent::Kind::kToken) continue;
      answer.tokens.push_back(event.token);
      answer.logprobs.push_back(event.logprobs.logprob);
    }
    return answer;
  }

  Limits limits_{.max_batch_tokens = 48};
  SteadyClock clock_;
  std::shared_ptr<const ModelSource> source_;
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<AdapterRegistry> registry_;
};

TEST_P(PrefixCacheModel, AnswersAreTheSameWithItAndWithoutIt) {
  struct Case {
    std::string adapter;
    std::vector<int32_t> prompt;
    Answer alone;
  };
  std::vector<Case> cases;
  for (const std::string adapter : {"", "lora", "dora"}) {
    for (int32_t turn = 0; turn < 3; ++turn) {
      Case& c = cases.emplace_back(Case{adapter, {}, {}});
      for (int32_t i = 0; i < 100; ++i) {
        c.prompt.push_back((i * 37 + 11) % source_->config().vocab);
      }
      c.prompt.insert(c.prompt.end(), 5, 3 + turn);
    }
  }
  {
    const auto engine = Start(false);
    for (Case& c : cases) c.alone = Ask(engine.get(), c.prompt, c.adapter);
  }
  const auto engine = Start(true);
  std::string before = "none";
  for (const Case& c : cases) {
    const Answer answer = Ask(engine.get(), c.prompt, c.adapter);
    EXPECT_EQ(c.alone.cached_tokens, 0);
    EXPECT_EQ(answer.cached_tokens, c.adapter == before ? 96 : 0) << c.adapter;
    EXPECT_EQ(answer.tokens, c.alone.tokens) << c.adapter;
    for (size_t i = 0; i < answer.logprobs.size(); ++i) {
      EXPECT_NEAR(answer.logprobs[i], c.alone.logprobs[i], 1e-4) << c.adapter << ", token " << i;
    }
    before = c.adapter;
  }
}

INSTANTIATE_TEST_SUITE_P(Precisions, PrefixCacheModel, ::testing::Values("exact", "fast"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace lorikeet
