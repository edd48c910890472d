#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "engine/model/config_gguf.h"
#include "engine/model/config_hf.h"
#include "engine/tensor/json.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using testing::AsBytes;
using testing::GgufBytes;
using ::testing::HasSubstr;
using testing::Raw;
using testing::RawVector;

// Four units in the last place: the oracle's power is good to one, its inverse and the arithmetic
// of the scalings round again.
void ExpectFrequencies(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_NEAR(got[i], want[i], 4.8e-7f * want[i]) << "frequency " << i;
  }
}

// tests/golden/configs: what Transformers builds from each config.json.
TEST(HfConfigTest, MeansWhatTransformersMakesOfIt) {
  const auto cases = ReadJsonFile("tests/golden/configs/configs.json");
  ASSERT_TRUE(cases.ok()) << cases.status();
  ASSERT_GE(cases->size(), 30u);
  for (const json& c : *cases) {
    SCOPED_TRACE(c["name"].get<std::string>());
    const auto config = ParseHfConfig(c["config"], c["generation"], "config.json");
    ASSERT_TRUE(config.ok()) << config.status();
    const json& want = c["expected"];
    EXPECT_EQ(config->family, c["config"]["model_type"]);
    EXPECT_EQ(config->layers, c["config"]["num_hidden_layers"]);
    EXPECT_EQ(config->hidden, c["config"]["hidden_size"]);
    EXPECT_EQ(config->ffn, c["config"]["intermediate_size"]);
    EXPECT_EQ(config->vocab, c["config"]["vocab_size"]);
    EXPECT_EQ(config->context, c["config"]["max_position_embeddings"]);
    EXPECT_EQ(config->heads, want["heads"]);
    EXPECT_EQ(config->kv_heads, want["kv_heads"]);
    EXPECT_EQ(config->head_dim, want["head_dim"]);
    EXPECT_EQ(config->norm_eps, want["norm_eps"].get<float>());
    EXPECT_EQ(config->qkv_bias, want["qkv_bias"]);
    EXPECT_EQ(config->o_bias, want["o_bias"]);
    EXPECT_EQ(config->mlp_bias, want["mlp_bias"]);
    EXPECT_EQ(config->qk_norm, want["qk_norm"]);
    EXPECT_EQ(config->tied_head, want["tied_head"]);
    EXPECT_EQ(json(config->layer_uses_rope), want["uses_rope"]);
    EXPECT_EQ(json(config->eos_ids), want["eos_ids"]);
    std::vector<int> windows;
    for (const uint8_t uses : config->layer_uses_window) {
      windows.push_back(uses ? config->sliding_window : 0);
    }
    EXPECT_EQ(json(windows), want["windows"]);
    std::vector<int> experts;
    for (int i = 0; i < config->layers; ++i) experts.push_back(config->has_experts(i) ? config->experts : 0);
    EXPECT_EQ(json(experts), want.value("experts", json(std::vector<int>(config->layers))));
    EXPECT_EQ(config->experts_per_token, want.value("experts_per_token", 0));
    EXPECT_EQ(config->expert_ffn, want.value("expert_ffn", 0));
    EXPECT_EQ(config->normalise_experts, want.value("normalise_experts", false));
    ExpectFrequencies(config->rope_inverse_frequencies,
                      want["inverse_frequencies"].get<std::vector<float>>());
  }
}

TEST(HfConfigTest, SettingsOfExpertsAreChecked) {
  const auto error = [](json change) {
    json config = {{"architectures", {"Qwen3MoeForCausalLM"}}, {"model_type", "qwen3_moe"},
                   {"hidden_size", 64}, {"intermediate_size", 96}, {"num_attention_heads", 4},
                   {"num_hidden_layers", 2}, {"vocab_size", 100}, {"max_position_embeddings", 256}};
    config.update(change);
    return std::string(ParseHfConfig(config, json(), "config.json").status().message());
  };
  EXPECT_EQ(error(json::object()), "");
  EXPECT_THAT(error({{"num_experts", 0}}), HasSubstr("num_experts is 0; it must be an integer from 1 to 1024"));
  EXPECT_THAT(error({{"num_experts", 4}}), HasSubstr("8 experts a token, but only 4 of them"));
  EXPECT_THAT(error({{"moe_intermediate_size", "x"}}), HasSubstr("moe_intermediate_size is \"x\""));
  EXPECT_THAT(error({{"mlp_only_layers", {2}}}), HasSubstr("mlp_only_layers is 2"));
  EXPECT_THAT(error({{"mlp_only_layers", 1}}), HasSubstr("must be a list of layers"));
  EXPECT_THAT(error({{"decoder_sparse_step", 0}}), HasSubstr("decoder_sparse_step is 0"));
}

json Llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"num_hidden_layers", 2},
          {"vocab_size", 100},
          {"max_position_embeddings", 256}};
}

struct Refusal {
  json change;  // merged into Llama(); a null removes the key
  std::vector<const char*> message;
};

TEST(HfConfigTest, WhatItDoesNotKnowIsRefusedByKeyAndValue) {
  const std::vector<Refusal> refusals = {
      {{{"architectures", {"GemmaForCausalLM"}}},
       {"[\"GemmaForCausalLM\"]", "LlamaForCausalLM, SmolLM3ForCausalLM"}},
      {{{"architectures", {"LlamaForCausalLM", "Other"}}}, {"Other"}},
      {{{"architectures", "LlamaForCausalLM"}}, {"architecture \"LlamaForCausalLM\""}},
      {{{"model_type", "mixtral"}}, {"model_type \"mixtral\""}},
      {{{"architectures", {"MistralForCausalLM"}}}, {"MistralForCausalLM", "\"llama\""}},
      {{{"architectures", nullptr}, {"model_type", nullptr}}, {"neither"}},
      {{{"hidden_act", "gelu"}}, {"hidden_act", "\"gelu\"", "silu"}},
      {{{"final_logit_softcapping", 30.0}}, {"final_logit_softcapping = 30.0"}},
      {{{"attn_logit_softcapping", 50}}, {"attn_logit_softcapping = 50"}},
      {{{"num_local_experts", 8}}, {"num_local_experts = 8"}},
      {{{"embedding_multiplier", 12.0}}, {"embedding_multiplier = 12.0"}},
      {{{"attention_multiplier", 0.015}}, {"attention_multiplier = 0.015"}},
      {{{"residual_multiplier", 0.22}}, {"residual_multiplier"}},
      {{{"logits_scaling", 8}}, {"logits_scaling = 8"}},
      {{{"partial_rotary_factor", 0.5}}, {"partial_rotary_factor = 0.5"}},
      {{{"use_qk_norm", true}}, {"use_qk_norm = true"}},
      {{{"attention_chunk_size", 8192}}, {"attention_chunk_size = 8192"}},
      {{{"quantization_config", {{"quant_method", "gptq"}}}}, {"quantization_config", "gptq"}},
      {{{"quantization_config", {{"quant_method", "bitsandbytes"}, {"load_in_8bit", true}}}},
       {"without load_in_4bit", "LLM.int8", "nf4"}},
      {{{"quantization_config",
         {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}, {"bnb_4bit_quant_type", "fp4"}}}},
       {"bnb_4bit_quant_type is \"fp4\"", "nf4"}},
      {{{"quantization_config", {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}}}},
       {"\"fp4\" by default", "nf4"}},
      {{{"quantization_config", "nf4"}}, {"quantization_config = \"nf4\""}},
      {{{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {64, 128}}}}},
       {"weight_block_size = [64,128]", "[128, 128]"}},
      {{{"quantization_config", {{"quant_method", "compressed-tensors"},
                                  {"transform_config", {{"config_groups", {{"R1", 1}}}}}}}},
       {"transform_config = ", "R1"}},
      {{{"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}}}, {"rope_scaling", "\"dynamic\""}},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}}}, {"\"yarn\""}},
      {{{"rope_scaling", {{"rope_type", "linear"}}}}, {"factor is missing"}},
      {{{"rope_scaling", {{"rope_type", "linear"}, {"factor", -1}}}}, {"factor is -1"}},
      {{{"rope_scaling", {{"rope_type", "linear"}, {"factor", "2"}}}}, {"factor is \"2\""}},
      {{{"rope_scaling", {{"rope_type", "default"}, {"mrope_section", {1, 2}}}}},
       {"rope_scaling.mrope_section = [1,2]"}},
      {{{"rope_parameters", {{"rope_theta", 1e4}, {"partial_rotary_factor", 0.25}}}},
       {"rope_parameters.partial_rotary_factor = 0.25"}},
      {{{"rope_parameters", {{"full_attention", {{"rope_theta", 1e4}}}}}},
       {"rope_parameters.full_attention"}},
      {{{"rope_parameters", 7}}, {"rope_parameters is 7", "object"}},
      {{{"rope_theta", 0}}, {"rope_theta is 0"}},
      {{{"rope_theta", 1e-44}, {"head_dim", 64}}, {"rotary frequency"}},
      {{{"hidden_size", nullptr}}, {"hidden_size is missing"}},
      {{{"hidden_size", -64}}, {"hidden_size is -64", "from 1 to 1048576"}},
      {{{"hidden_size", 64.5}}, {"hidden_size is 64.5"}},
      {{{"hidden_size", "64"}}, {"hidden_size is \"64\""}},
      {{{"hidden_size", 18446744073709551615u}}, {"hidden_size is 18446744073709551615"}},
      {{{"hidden_size", 66}}, {"hidden_size 66 is not a multiple of num_attention_heads 4"}},
      {{{"num_hidden_layers", 5000}}, {"num_hidden_layers is 5000"}},
      {{{"num_key_value_heads", 3}}, {"4 query heads", "3 key-value heads"}},
      {{{"num_key_value_heads", 0}}, {"num_key_value_heads is 0"}},
      {{{"head_dim", 15}}, {"head size 15 is odd"}},
      {{{"rms_norm_eps", 0}}, {"rms_norm_eps is 0"}},
      {{{"attention_bias", 1}}, {"attention_bias is 1", "true or false"}},
      {{{"layer_types", {"full_attention", "chunked_attention"}}}, {"\"chunked_attention\""}},
      {{{"layer_types", {"full_attention", "sliding_attention"}}}, {"layer_types[1]"}},
      {{{"layer_types", {"full_attention"}}}, {"layer_types", "2 names"}},
      {{{"no_rope_layers", {1, 0}}}, {"no_rope_layers"}},
      {{{"eos_token_id", "</s>"}}, {"eos_token_id is \"</s>\""}},
  };
  for (const Refusal& refusal : refusals) {
    json config = Llama();
    config.merge_patch(refusal.change);
    const auto parsed = ParseHfConfig(config, nullptr, "dir/config.json");
    ASSERT_FALSE(parsed.ok()) << refusal.change;
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << refusal.change;
    for (const char* part : refusal.message) {
      EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(part)) << refusal.change;
    }
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("dir/config.json"));
  }
}

TEST(HfConfigTest, NeutralSettingsOfRelatedModelsPass) {
  json config = Llama();
  config.update({{"attn_logit_softcapping", nullptr},
                 {"logits_scaling", 1.0},
                 {"embedding_multiplier", 1},
                 {"partial_rotary_factor", 1.0},
                 {"use_qk_norm", false},
                 {"num_experts", 0},
                 {"hidden_act", "silu"},
                 {"torch_dtype", "bfloat16"},
                 {"unsloth_fixed", true},
                 {"layer_types", {"full_attention", "full_attention"}}});
  const auto parsed = ParseHfConfig(config, nullptr, "config.json");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
}

TEST(HfConfigTest, OneNameOfTheArchitectureIsEnough) {
  json config = Llama();
  config.erase("model_type");
  EXPECT_TRUE(ParseHfConfig(config, nullptr, "c").ok());
  config = Llama();
  config.erase("architectures");
  EXPECT_TRUE(ParseHfConfig(config, nullptr, "c").ok());
}

GgufBytes LlamaGguf(const std::string& arch = "llama") {
  GgufBytes file;
  file.Text("general.architecture", arch)
      .Uint(arch + ".block_count", 5)
      .Uint(arch + ".context_length", 256)
      .Uint(arch + ".embedding_length", 64)
      .Uint(arch + ".feed_forward_length", 96)
      .Uint(arch + ".attention.head_count", 4)
      .Float(arch + ".attention.layer_norm_rms_epsilon", 1e-5f)
      .Uint(arch + ".vocab_size", 100);
  return file;
}

absl::StatusOr<ModelConfig> Parse(const GgufBytes& builder) {
  const std::string bytes = builder.Build();
  auto content = ParseGguf(AsBytes(bytes), "m.gguf");
  if (!content.ok()) return content.status();
  const GgufFile file{std::move(content->metadata), TensorFile({}, std::move(content->tensors))};
  return ParseGgufConfig(file, "m.gguf");
}

TEST(GgufConfigTest, DefaultsAreThoseOfTheFormat) {
  const auto config = Parse(LlamaGguf());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, "llama");
  EXPECT_EQ(config->kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->layer_uses_rope, std::vector<uint8_t>(5, 1));
  EXPECT_EQ(config->sliding_window, 0);
  EXPECT_TRUE(config->tied_head);
  EXPECT_TRUE(config->eos_ids.empty());
  std::vector<float> want;
  for (int i = 0; i < 8; ++i) want.push_back(std::pow(10000.0, -i / 8.0));
  ExpectFrequencies(config->rope_inverse_frequencies, want);
}

TEST(GgufConfigTest, ReadsWhatFamiliesAdd) {
  auto config = Parse(LlamaGguf("smollm3"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->layer_uses_rope, (std::vector<uint8_t>{1, 1, 1, 0, 1}));
  EXPECT_TRUE(GgufPermutesQk(*config));

  config = Parse(LlamaGguf("qwen2"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->qkv_bias);
  EXPECT_FALSE(config->o_bias);
  EXPECT_FALSE(GgufPermutesQk(*config));

  config = Parse(LlamaGguf("qwen3")
                     .Uint("qwen3.attention.key_length", 32)
                     .Uint("qwen3.attention.value_length", 32));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->qk_norm);
  EXPECT_EQ(config->head_dim, 32);
  EXPECT_FALSE(GgufPermutesQk(*config));

  config = Parse(LlamaGguf().Uint("llama.attention.sliding_window", 24));  // a Mistral
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->sliding_window, 24);
  EXPECT_EQ(config->layer_uses_window, std::vector<uint8_t>(5, 1));
}

TEST(GgufConfigTest, CollectsEveryIdThatEndsAnAnswer) {
  const auto config = Parse(LlamaGguf()
                                .Uint("tokenizer.ggml.eos_token_id", 9)
                                .Uint("tokenizer.ggml.eot_token_id", 7)
                                .Uint("tokenizer.ggml.eom_token_id", 9));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eos_ids, (std::vector<int32_t>{7, 9}));
}

// Llama 3.1's scaling as converters write it: the same frequencies as its config.json gives, up to
// the roundings of the factors' way through the file.
TEST(GgufConfigTest, RopeFactorsEqualTheScalingTheyWereMadeFrom) {
  json hf = Llama();
  hf.update({{"head_dim", 64},
             {"rope_theta", 500000.0},
             {"rope_scaling",
              {{"rope_type", "llama3"},
               {"factor", 8.0},
               {"low_freq_factor", 1.0},
               {"high_freq_factor", 4.0},
               {"original_max_position_embeddings", 8192}}}});
  const auto want = ParseHfConfig(hf, nullptr, "config.json");
  ASSERT_TRUE(want.ok()) << want.status();

  std::vector<float> factors;  // in double precision, by Llama 3.1's definition
  for (int i = 0; i < 32; ++i) {
    const double wave = 2 * M_PI * std::pow(500000.0, i / 32.0);
    const double kept = (8192 / wave - 1) / 3;
    factors.push_back(wave < 2048 ? 1 : wave > 8192 ? 8 : 1 / ((1 - kept) / 8 + kept));
  }
  ASSERT_NE(factors[16], 1.0f);  // all three ranges occur
  const auto got = Parse(LlamaGguf()
                             .Uint("llama.attention.key_length", 64)
                             .Uint("llama.attention.value_length", 64)
                             .Float("llama.rope.freq_base", 500000.0f)
                             .Tensor("rope_freqs.weight", {32}, 0, RawVector(factors)));
  ASSERT_TRUE(got.ok()) << got.status();
  ASSERT_EQ(got->rope_inverse_frequencies.size(), 32u);
  for (int i = 0; i < 32; ++i) {
    const float expected = want->rope_inverse_frequencies[i];
    EXPECT_NEAR(got->rope_inverse_frequencies[i], expected, 2e-6f * expected) << i;
  }
}

TEST(GgufConfigTest, ExpertsOfQwen3MoeHaveAWidthOfTheirOwn) {
  const auto config = Parse(LlamaGguf("qwen3moe")
                                .Uint("qwen3moe.expert_count", 16)
                                .Uint("qwen3moe.expert_used_count", 4)
                                .Uint("qwen3moe.expert_feed_forward_length", 40));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->experts, 16);
  EXPECT_EQ(config->experts_per_token, 4);
  EXPECT_EQ(config->expert_ffn, 40);
  EXPECT_TRUE(config->normalise_experts && config->qk_norm);
  EXPECT_TRUE(config->has_experts(0) && config->has_experts(config->layers - 1));
  EXPECT_EQ(Parse(LlamaGguf("qwen3moe")).status().message(),
            "m.gguf: qwen3moe.expert_count is missing");
}

TEST(GgufConfigTest, LinearScalingHasTwoNames) {
  const auto plain = Parse(LlamaGguf());
  ASSERT_TRUE(plain.ok()) << plain.status();
  std::vector<float> want = plain->rope_inverse_frequencies;
  for (float& frequency : want) frequency /= 4;
  const GgufBytes files[] = {
      LlamaGguf().Text("llama.rope.scaling.type", "linear").Float("llama.rope.scaling.factor", 4),
      LlamaGguf().Float("llama.rope.scale_linear", 4)};
  for (const GgufBytes& file : files) {
    const auto config = Parse(file);
    ASSERT_TRUE(config.ok()) << config.status();
    ExpectFrequencies(config->rope_inverse_frequencies, want);
  }
}

TEST(GgufConfigTest, WhatItDoesNotKnowIsRefusedByKeyAndValue) {
  struct Case {
    std::function<GgufBytes()> file;
    const char* message;
  };
  const Case cases[] = {
      {[] { return GgufBytes(); }, "general.architecture is missing"},
      {[] { return GgufBytes().Text("general.architecture", "gemma2"); },
       "general.architecture \"gemma2\" is not supported; supported are llama, smollm3, qwen2"},
      {[] { return GgufBytes().Uint("general.architecture", 1); }, "general.architecture 1"},
      {[] { return LlamaGguf().Text("general.type", "adapter"); }, "\"adapter\", not a model"},
      {[] { return LlamaGguf().Value("split.count", 2, Raw(uint16_t{3})); }, "split.count"},
      {[] { return LlamaGguf().Uint("llama.expert_count", 8); }, "llama.expert_used_count is missing"},
      {[] { return LlamaGguf().Uint("llama.expert_count", 8).Uint("llama.expert_used_count", 9); },
       "9 experts a token, but only 8 of them"},
      {[] { return LlamaGguf("qwen2").Uint("qwen2.expert_count", 8); }, "qwen2.expert_count = 8"},
      {[] { return LlamaGguf().Float("llama.attn_logit_softcapping", 50); },
       "llama.attn_logit_softcapping = 50"},
      {[] { return LlamaGguf().Float("llama.attention.scale", 0.1f); }, "llama.attention.scale"},
      {[] { return LlamaGguf("qwen2").Uint("qwen2.attention.sliding_window", 64); },
       "qwen2.attention.sliding_window = 64"},
      {[] { return LlamaGguf().Uint("llama.rope.dimension_count", 8); },
       "llama.rope.dimension_count 8 of 16 values"},
      {[] { return LlamaGguf().Text("llama.rope.scaling.type", "yarn"); }, "\"yarn\""},
      {[] { return LlamaGguf().Float("llama.rope.scaling.attn_factor", 2); },
       "llama.rope.scaling.attn_factor = 2"},
      {[] { return LlamaGguf().Float("llama.rope.freq_base", -1); }, "llama.rope.freq_base is -1"},
      {[] { return LlamaGguf().Float("llama.rope.freq_base", NAN); },
       "llama.rope.freq_base is nan"},
      {[] { return LlamaGguf().Uint("llama.attention.value_length", 8); },
       "llama.attention.value_length 8 differs"},
      {[] {
         return LlamaGguf().Array("llama.attention.head_count_kv", 4, 2,
                                  RawVector<uint32_t>({1, 2}));
       },
       "llama.attention.head_count_kv differs between layers"},
      {[] { return LlamaGguf().Uint("llama.attention.head_count_kv", 3); }, "3 key-value heads"},
      {[] { return LlamaGguf().Uint("llama.attention.head_count_kv", 0); }, "head_count_kv is 0"},
      {[] { return LlamaGguf().Value("llama.attention.causal", 7, Raw(uint8_t{0})); },
       "llama.attention.causal is false"},
      {[] { return LlamaGguf().Tensor("rope_freqs.weight", {4}, 0, std::string(16, 1)); },
       "rope_freqs.weight is F32 [4]; it must be F32 [8]"},
      {[] { return LlamaGguf().Tensor("rope_freqs.weight", {8}, 0, std::string(32, 0)); },
       "rope_freqs.weight[0] is 0"},
      {[] { return LlamaGguf().Uint("tokenizer.ggml.eos_token_id", 100); },
       "tokenizer.ggml.eos_token_id is 100; it must be an integer from 0 to 99"},
  };
  for (const Case& c : cases) {
    const auto config = Parse(c.file());
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(c.message));
  }
}

TEST(GgufConfigTest, NamesTheMissingKey) {
  const GgufBytes bare = GgufBytes().Text("general.architecture", "qwen3");
  EXPECT_THAT(std::string(Parse(bare).status().message()),
              HasSubstr("qwen3.block_count is missing"));
}

}  // namespace
}  // namespace lorikeet
