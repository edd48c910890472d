// Models with adapters in their weights: alone, without any adapter, they give what PEFT gives.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "server/merge.h"
#include "tests/support/checkpoint_bytes.h"
#include "tests/support/compare_variants.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr Bounds kBounds{1e-3, 1e-3};

std::vector<ConvertTerm> TermsOf(const VariantCase& c) {
  std::vector<ConvertTerm> terms;
  for (const WeightedAdapter& adapter : c.adapters) {
    terms.push_back({kGoldenRoot / "variants" / adapter.name, adapter.weight});
  }
  return terms;
}

TEST(Merge, GivesModelsThatComputeWhatPeftComputes) {
  const testing::TempDir directory;
  const std::set<std::string> no_weights = {
      "adaption_prompt", "alora", "arrow", "arrow_gks", "beft", "bottleneck_leave_out", "cartridge", "compacter",
      "compacter_plus", "cpt", "expert_prompt_tuning", "houlsby", "layer_replication", "loretta_adapter", "mixlora", "mixlora_one", "mixlora_some", "mixture_ia3", "mole",
      "mole_qwen2", "multitask_prompt",
      "p_tuning", "parallel_bottleneck",
      "pfeiffer", "prefix_tuning", "prefix_tuning_gqa", "prompt_tuning",
      "xlora", "xlora_layers", "xlora_top"};
  std::set<std::string> refused;
  double largest = 0;
  int merged = 0;
  for (VariantCase c : LoadVariantCases()) {
    const fs::path out = directory.path() / c.name;
    const absl::Status status = MergeAdapters(kGoldenRoot / "models" / ModelOf(c.base), TermsOf(c), out);
    if (!status.ok()) {
      EXPECT_FALSE(fs::exists(out)) << c.name;
      EXPECT_GT(status.message().size(), 30u) << status;
      refused.insert(c.name);
      continue;
    }
    ++merged;
    c.adapters.clear();
    VariantServer server(out.string(), {.device = "cpu", .precision = "exact", .threads = 1,
                                        .kv_bytes = 4 << 20});
    // Of a base in 4 bits the merged weights are rounded to bfloat16.
    const bool rounded = c.base.find("nf4") != std::string::npos;
    const Bounds bounds = rounded ? Bounds{0.1, 1.5} : kBounds;
    Errors errors;
    for (const VariantPrompt& prompt : c.prompts) {
      Compare(c, prompt, Drain(Submit(&server, c, prompt).get()), bounds, &errors);
    }
    EXPECT_LE(errors.mean(), bounds.mean) << c.name;
    EXPECT_LE(errors.largest, bounds.largest) << c.name;
    if (!rounded) largest = std::max(largest, errors.largest);
    fs::remove_all(out);
  }
  EXPECT_EQ(refused, no_weights);
  std::printf("%d models merged, largest error %.1e\n", merged, largest);
}

TEST(Merge, KeepsWhatTheDirectoryHasBesides) {
  const testing::TempDir directory;
  const fs::path base = kGoldenRoot / "models/qwen2", out = directory.path() / "merged";
  ASSERT_TRUE(MergeAdapters(base, {{{kGoldenRoot / "variants/rslora"}}}, out).ok());
  EXPECT_TRUE(fs::exists(out / "tokenizer.json"));
  const auto config = nlohmann::json::parse(std::ifstream(out / "config.json"));
  EXPECT_TRUE(config["tie_word_embeddings"]);
  EXPECT_TRUE(absl::IsAlreadyExists(MergeAdapters(base, {{{kGoldenRoot / "variants/rslora"}}}, out)));
  EXPECT_TRUE(absl::IsInvalidArgument(MergeAdapters(
      kGoldenRoot / "models/llama-F32.gguf", {{{kGoldenRoot / "variants/lora"}}}, out)));
  const fs::path resized = directory.path() / "resized";
  ASSERT_TRUE(MergeAdapters(base, {{{kGoldenRoot / "variants/added_tokens_tied"}}}, resized).ok());
  const auto own = nlohmann::json::parse(std::ifstream(resized / "config.json"));
  EXPECT_FALSE(own["tie_word_embeddings"]);
  EXPECT_EQ(own["vocab_size"], 332);
}

}  // namespace
}  // namespace lorikeet
