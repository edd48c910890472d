// Thousands of damaged copies of valid files through each parser, the same ones on every run. The
// address sanitizer's build shows reads that go wrong without ending the process.
#include <gtest/gtest.h>

#include <functional>

#include "tests/fuzz/mutator.h"
#include "tests/fuzz/parsers.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using testing::AsBytes;
using testing::GgufBytes;
using testing::Mutator;
using testing::RawVector;

std::string SmallSafetensors() {
  return testing::Safetensors(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},)"
      R"("c":{"dtype":"F16","shape":[],"data_offsets":[32,34]}})",
      std::string(34, 'd'));
}

std::string SmallGguf() {
  return GgufBytes()
      .Text("general.architecture", "llama")
      .Uint("general.alignment", 32)
      .Uint("llama.block_count", 2)
      .Uint("llama.embedding_length", 8)
      .Uint("llama.feed_forward_length", 16)
      .Uint("llama.context_length", 64)
      .Uint("llama.attention.head_count", 2)
      .Array("llama.attention.head_count_kv", 4, 2, RawVector<uint32_t>({1, 1}))
      .Float("llama.attention.layer_norm_rms_epsilon", 1e-5f)
      .Float("llama.rope.freq_base", 10000.0f)
      .Uint("tokenizer.ggml.eos_token_id", 2)
      .Array("tokenizer.ggml.tokens", 8, 2, GgufBytes::String("a") + GgufBytes::String("bc"))
      .Array("tokenizer.ggml.scores", 6, 2, RawVector<float>({0, -1}))
      .Tensor("token_embd.weight", {8, 4}, 1, std::string(64, 'e'))
      .Tensor("rope_freqs.weight", {2}, 0, RawVector<float>({1, 8}))
      .Tensor("blk.0.ffn_up.weight", {32, 2}, 8, std::string(68, 'q'))
      .Build();
}

std::string SmallConfig() {
  return R"({"architectures":["SmolLM3ForCausalLM"],"model_type":"smollm3","hidden_size":64,)"
         R"("num_hidden_layers":4,"intermediate_size":96,"num_attention_heads":4,)"
         R"("num_key_value_heads":2,"vocab_size":100,"max_position_embeddings":256,)"
         R"("no_rope_layers":[1,1,1,0],"use_sliding_window":true,"sliding_window":8,)"
         R"("layer_types":["full_attention","full_attention","full_attention",)"
         R"("sliding_attention"],"hidden_act":"silu","rms_norm_eps":1e-5,"eos_token_id":[1,2],)"
         R"("rope_parameters":{"rope_type":"llama3","rope_theta":500000.0,"factor":8.0,)"
         R"("low_freq_factor":1.0,"high_freq_factor":4.0,)"
         R"("original_max_position_embeddings":64}})";
}

struct Parser {
  const char* name;
  std::function<std::string()> valid;
  void (*property)(std::span<const std::byte>);
};

class MutationTest : public ::testing::TestWithParam<Parser> {};

TEST_P(MutationTest, DamagedFilesGetAStatusOrValidViews) {
  const std::string valid = GetParam().valid();
  GetParam().property(AsBytes(valid));
  for (uint32_t seed = 0; seed < 5000; ++seed) {
    SCOPED_TRACE(seed);
    const std::string damaged = Mutator(seed).Mutate(valid);
    // Of the exact size on the heap, where the sanitizer guards both ends.
    const std::vector<char> bytes(damaged.begin(), damaged.end());
    GetParam().property(AsBytes({bytes.data(), bytes.size()}));
  }
}

INSTANTIATE_TEST_SUITE_P(Parsers, MutationTest,
                         ::testing::Values(Parser{"Safetensors", SmallSafetensors,
                                                  testing::FuzzSafetensors},
                                           Parser{"Gguf", SmallGguf, testing::FuzzGguf},
                                           Parser{"HfConfig", SmallConfig, testing::FuzzHfConfig}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lorikeet
