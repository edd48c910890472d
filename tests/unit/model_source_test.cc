#include "engine/model/model_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>

#include "engine/tensor/json.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using nlohmann::json;
using testing::GgufBytes;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Raw;
using testing::RawVector;
using testing::TempDir;

constexpr int kLayers = 2, kHidden = 32, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kFfn = 64,
              kVocab = 10;

struct Tensor {
  std::vector<int64_t> shape;
  DType dtype = DType::kF32;
  std::string bytes;
};

// A small model under Hugging Face's names, every row unlike every other, in both file formats.
class TinyModel {
 public:
  TinyModel(const std::string& family, DType linears) : family_(family) {
    Add("model.embed_tokens", {kVocab, kHidden}, linears);
    Add("model.norm", {kHidden}, DType::kF32);
    Add("lm_head", {kVocab, kHidden}, linears);
    for (int i = 0; i < kLayers; ++i) {
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      Add(layer + "input_layernorm", {kHidden}, DType::kF32);
      Add(layer + "post_attention_layernorm", {kHidden}, DType::kF32);
      Add(layer + "self_attn.q_proj", {kHeads * kHeadDim, kHidden}, linears);
      Add(layer + "self_attn.k_proj", {kKvHeads * kHeadDim, kHidden}, linears);
      Add(layer + "self_attn.v_proj", {kKvHeads * kHeadDim, kHidden}, linears);
      Add(layer + "self_attn.o_proj", {kHidden, kHeads * kHeadDim}, linears);
      Add(layer + "mlp.gate_proj", {kFfn, kHidden}, linears);
      Add(layer + "mlp.up_proj", {kFfn, kHidden}, linears);
      Add(layer + "mlp.down_proj", {kHidden, kFfn}, linears);
      if (family == "qwen2" || family == "llama") {
        for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
          const int heads = name[0] == 'q' ? kHeads : kKvHeads;
          Add(layer + "self_attn." + name, {heads * kHeadDim}, DType::kF32, ".bias");
        }
        if (family == "llama") {
          Add(layer + "self_attn.o_proj", {kHidden}, DType::kF32, ".bias");
        }
      }
      if (family == "qwen3") {
        Add(layer + "self_attn.q_norm", {kHeadDim}, DType::kF32);
        Add(layer + "self_attn.k_norm", {kHeadDim}, DType::kF32);
      }
    }
  }

  std::map<std::string, Tensor>& tensors() { return tensors_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

  json Config() const {
    const std::map<std::string, const char*> classes = {{"llama", "LlamaForCausalLM"},
                                                        {"smollm3", "SmolLM3ForCausalLM"},
                                                        {"qwen2", "Qwen2ForCausalLM"},
                                                        {"qwen3", "Qwen3ForCausalLM"}};
    return {{"architectures", {classes.at(family_)}},
            {"model_type", family_},
            {"attention_bias", family_ == "llama"},
            {"tie_word_embeddings", tensors_.count("lm_head.weight") == 0},
            {"hidden_size", kHidden},
            {"intermediate_size", kFfn},
            {"num_attention_heads", kHeads},
            {"num_key_value_heads", kKvHeads},
            {"num_hidden_layers", kLayers},
            {"head_dim", kHeadDim},
            {"vocab_size", kVocab},
            {"eos_token_id", 3},
            {"max_position_embeddings", 128}};
  }

  // `padding` spaces after the header shift all data.
  void WriteDirectory(const std::filesystem::path& path, const json& config,
                      int padding = 0) const {
    json header = json::object();
    std::string data;
    for (const auto& [name, tensor] : tensors_) {
      const size_t end = data.size() + tensor.bytes.size();
      header[name] = {{"dtype", Info(tensor.dtype).name},
                      {"shape", tensor.shape},
                      {"data_offsets", {data.size(), end}}};
      data += tensor.bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8 + padding, ' ');
    std::ofstream(path / "config.json") << config;
    std::ofstream(path / "model.safetensors", std::ios::binary) << testing::Safetensors(text, data);
  }

  // As the converters write it: llama and smollm3 with the rows of q and k permuted.
  GgufBytes Gguf() const {
    GgufBytes file;
    file.Text("general.architecture", family_)
        .Uint(family_ + ".block_count", kLayers)
        .Uint(family_ + ".context_length", 128)
        .Uint(family_ + ".embedding_length", kHidden)
        .Uint(family_ + ".feed_forward_length", kFfn)
        .Uint(family_ + ".attention.head_count", kHeads)
        .Uint(family_ + ".attention.head_count_kv", kKvHeads)
        .Uint(family_ + ".attention.key_length", kHeadDim)
        .Uint(family_ + ".attention.value_length", kHeadDim)
        .Float(family_ + ".attention.layer_norm_rms_epsilon", 1e-6f)
        .Uint("tokenizer.ggml.eos_token_id", 3);
    const bool permuted = family_ == "llama" || family_ == "smollm3";
    for (const auto& [name, tensor] : tensors_) {
      const bool q = name.find("q_proj") != std::string::npos;
      const bool k = name.find("k_proj") != std::string::npos;
      const std::string bytes =
          permuted && (q || k) ? Permuted(tensor, q ? kHeads : kKvHeads) : tensor.bytes;
      file.Tensor(GgufName(name), {tensor.shape.rbegin(), tensor.shape.rend()},
                  GgufType(tensor.dtype), bytes);
    }
    return file;
  }

 private:
  void Add(const std::string& module, std::vector<int64_t> shape, DType dtype,
           const char* suffix = ".weight") {
    Tensor tensor{std::move(shape), dtype, ""};
    int64_t elements = 1;
    for (const int64_t size : tensor.shape) elements *= size;
    tensor.bytes.resize(ByteSize(dtype, elements));
    for (char& byte : tensor.bytes) {
      random_ = random_ * 6364136223846793005 + 1;
      byte = static_cast<char>(random_ >> 56);
    }
    tensors_[module + suffix] = std::move(tensor);
  }

  // weights.reshape(heads, 2, rows / heads / 2, ...).swapaxes(1, 2), the converters' step.
  static std::string Permuted(const Tensor& tensor, int heads) {
    const size_t rows = tensor.shape[0], row_bytes = tensor.bytes.size() / rows;
    const size_t half = rows / heads / 2;
    std::string out;
    for (int head = 0; head < heads; ++head) {
      for (size_t i = 0; i < half; ++i) {
        for (size_t side = 0; side < 2; ++side) {
          out += tensor.bytes.substr(((head * 2 + side) * half + i) * row_bytes, row_bytes);
        }
      }
    }
    return out;
  }

  static uint32_t GgufType(DType dtype) {
    switch (dtype) {
      case DType::kF32:
        return 0;
      case DType::kF16:
        return 1;
      case DType::kQ4_1:
        return 3;
      case DType::kQ8_0:
        return 8;
      default:
        return 30;  // BF16
    }
  }

  static std::string GgufName(std::string name) {
    const std::pair<const char*, const char*> parts[] = {
        {"model.embed_tokens", "token_embd"},
        {"model.norm", "output_norm"},
        {"lm_head", "output"},
        {"model.layers", "blk"},
        {"input_layernorm", "attn_norm"},
        {"post_attention_layernorm", "ffn_norm"},
        {"self_attn.q_proj", "attn_q"},
        {"self_attn.k_proj", "attn_k"},
        {"self_attn.v_proj", "attn_v"},
        {"self_attn.o_proj", "attn_output"},
        {"self_attn.q_norm", "attn_q_norm"},
        {"self_attn.k_norm", "attn_k_norm"},
        {"mlp.gate_proj", "ffn_gate"},
        {"mlp.up_proj", "ffn_up"},
        {"mlp.down_proj", "ffn_down"},
    };
    for (const auto& [from, to] : parts) {
      if (const size_t at = name.find(from); at != std::string::npos) {
        name.replace(at, std::string(from).size(), to);
      }
    }
    return name;
  }

  std::string family_;
  uint64_t random_ = 1;
  std::map<std::string, Tensor> tensors_;
};

std::string Bytes(const TensorView& view) {
  return {reinterpret_cast<const char*>(view.bytes.data()), view.bytes.size()};
}

void ExpectIs(const TensorView* view, const TinyModel& model, const std::string& name) {
  const auto& tensors = model.tensors();
  ASSERT_EQ(tensors.count(name), view == nullptr ? 0u : 1u) << name;
  if (view == nullptr) return;
  const Tensor& want = tensors.at(name);
  EXPECT_EQ(view->shape, want.shape) << name;
  EXPECT_EQ(view->dtype, want.dtype) << name;
  EXPECT_TRUE(Bytes(*view) == want.bytes) << name << " has other bytes";
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view->bytes.data()) % (want.dtype == DType::kF32 ? 4 : 2),
            0u)
      << name;
}

void ExpectHolds(const ModelSource& source, const TinyModel& model) {
  ExpectIs(&source.embedding(), model, "model.embed_tokens.weight");
  ExpectIs(&source.final_norm(), model, "model.norm.weight");
  for (ModuleId id = 0; id < ModuleCount(kLayers); ++id) {
    const std::string path = ModulePath(id, kLayers);
    ExpectIs(&source.weight(id), model, path + ".weight");
    ExpectIs(source.bias(id), model, path + ".bias");
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const LayerNorms& norms = source.norms(layer);
    ExpectIs(norms.input, model, prefix + "input_layernorm.weight");
    ExpectIs(norms.post_attention, model, prefix + "post_attention_layernorm.weight");
    ExpectIs(norms.q, model, prefix + "self_attn.q_norm.weight");
    ExpectIs(norms.k, model, prefix + "self_attn.k_norm.weight");
  }
}

class ModelSourceFamilyTest : public ::testing::TestWithParam<const char*> {};

// The bytes of every module, bit for bit, from a directory and from a GGUF of each block type:
// what a file holds permuted comes back in Hugging Face's order.
TEST_P(ModelSourceFamilyTest, BothFormatsGiveTheSameWeights) {
  const TempDir dir;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const TinyModel model(GetParam(), dtype);
    model.WriteDirectory(dir.path(), model.Config());
    const auto source = ModelSource::Open(dir.path());
    ASSERT_TRUE(source.ok()) << source.status();
    ExpectHolds(**source, model);
    EXPECT_EQ((*source)->gguf(), nullptr);
    EXPECT_EQ((*source)->config().name, dir.path().filename());
  }
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kQ8_0, DType::kQ4_1}) {
    SCOPED_TRACE(Info(dtype).name);
    const TinyModel model(GetParam(), dtype);
    const auto source = ModelSource::Open(dir.Write("tiny.gguf", model.Gguf().Build()));
    ASSERT_TRUE(source.ok()) << source.status();
    ExpectHolds(**source, model);
    ASSERT_NE((*source)->gguf(), nullptr);
    EXPECT_EQ((*source)->gguf()->count("general.architecture"), 1u);
    EXPECT_EQ((*source)->config().name, "tiny");
    EXPECT_EQ((*source)->config().eos_ids, std::vector<int32_t>{3});
  }
}

TEST_P(ModelSourceFamilyTest, ATiedHeadIsTheEmbedding) {
  const TempDir dir;
  TinyModel model(GetParam(), DType::kF16);
  model.tensors().erase("lm_head.weight");
  model.WriteDirectory(dir.path(), model.Config(), /*padding=*/1);  // copies must stay tied
  const std::filesystem::path paths[] = {dir.path(), dir.Write("t.gguf", model.Gguf().Build())};
  for (const auto& path : paths) {
    const auto source = ModelSource::Open(path);
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_TRUE((*source)->config().tied_head);
    EXPECT_EQ(&(*source)->weight(HeadModule(kLayers)), &(*source)->embedding());
  }
}

INSTANTIATE_TEST_SUITE_P(Families, ModelSourceFamilyTest,
                         ::testing::Values("llama", "smollm3", "qwen2", "qwen3"));

// With layers that differ in kind: without rotation, without experts.
TEST(ModelSourceTest, StackedLayersAreThoseOfTheFile) {
  for (const char* name : {"smollm3", "qwen3-moe"}) {
    SCOPED_TRACE(name);
    const std::filesystem::path path = std::filesystem::path("tests/golden/models") / name;
    const auto whole = ModelSource::Open(path);
    ASSERT_TRUE(whole.ok()) << whole.status();
    const ModelConfig& from = (*whole)->config();
    const int32_t last = from.layers - 1;
    const auto stacked = ModelSource::Open(path, {{0, from.layers}, {last, from.layers}, {1, 2}});
    ASSERT_TRUE(stacked.ok()) << stacked.status();
    const ModelConfig& config = (*stacked)->config();
    ASSERT_EQ(config.layers, from.layers + 2);
    EXPECT_EQ((*stacked)->first_like(from.layers), last);
    EXPECT_EQ((*stacked)->first_like(from.layers + 1), 1);
    EXPECT_EQ((*stacked)->first_like(last), last);
    for (const auto& [layer, origin] : {std::pair(last, last), {last + 1, last}, {last + 2, 1}}) {
      EXPECT_EQ(config.layer_uses_rope[layer], from.layer_uses_rope[origin]) << layer;
      EXPECT_EQ(config.has_experts(layer), from.has_experts(origin)) << layer;
      EXPECT_EQ((*stacked)->norms(layer).input->shape, (*whole)->norms(origin).input->shape);
      EXPECT_TRUE(std::ranges::equal((*stacked)->weight(LayerModule(layer, Linear::kO)).bytes,
                                     (*whole)->weight(LayerModule(origin, Linear::kO)).bytes));
      if (!config.has_experts(layer)) continue;
      EXPECT_TRUE(std::ranges::equal(
          (*stacked)->weight(ExpertModule(config.layers, config.experts, layer, 1, Linear::kDown)).bytes,
          (*whole)->weight(ExpertModule(from.layers, from.experts, origin, 1, Linear::kDown)).bytes));
    }
    EXPECT_EQ((*stacked)->path(LayerModule(last + 2, Linear::kQ)),
              "model.layers." + std::to_string(last + 2) + ".self_attn.q_proj");
    EXPECT_EQ(ModelSource::Open(path, {{1, from.layers + 1}}).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(ModelSourceTest, UnalignedTensorsAreCopied) {
  const TempDir dir;
  const TinyModel model("qwen3", DType::kBF16);
  model.WriteDirectory(dir.path(), model.Config(), /*padding=*/1);
  const auto source = ModelSource::Open(dir.path() / "");  // a trailing slash changes nothing
  ASSERT_TRUE(source.ok()) << source.status();
  ExpectHolds(**source, model);
  EXPECT_EQ((*source)->config().name, dir.path().filename());
}

TEST(ModelSourceTest, SaysEverythingThatDoesNotFitAtOnce) {
  const TempDir dir;
  TinyModel model("llama", DType::kF32);
  model.tensors().erase("model.layers.0.self_attn.q_proj.weight");
  model.tensors().erase("model.layers.1.mlp.down_proj.weight");
  model.tensors().erase("model.layers.1.self_attn.o_proj.bias");
  model.tensors().at("model.norm.weight") = {
      {kHidden + 1}, DType::kF32, std::string((kHidden + 1) * 4, 0)};
  model.tensors()["model.layers.2.mlp.up_proj.weight"] = {{1}, DType::kF32, "1234"};
  model.tensors()["model.layers.0.self_attn.rotary_emb.inv_freq"] = {{1}, DType::kF32, "1234"};
  model.WriteDirectory(dir.path(), model.Config());
  const absl::Status status = ModelSource::Open(dir.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr("3 missing: "));
  for (const char* part :
       {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.o_proj.bias", "model.norm.weight is [33], not [32]",
        "1 with no place in the model: model.layers.2.mlp.up_proj.weight"}) {
    EXPECT_THAT(message, HasSubstr(part));
  }
  EXPECT_THAT(message, Not(HasSubstr("inv_freq")));
}

TEST(ModelSourceTest, BiasesTheConfigurationDoesNotNameAreNotDropped) {
  const TempDir dir;
  const TinyModel model("llama", DType::kF32);
  json config = model.Config();
  config["attention_bias"] = false;
  model.WriteDirectory(dir.path(), config);
  EXPECT_THAT(std::string(ModelSource::Open(dir.path()).status().message()),
              HasSubstr("8 with no place in the model"));
}

TEST(ModelSourceTest, AVectorMayNotBeQuantised) {
  const TempDir dir;
  TinyModel model("qwen2", DType::kQ8_0);
  model.tensors().at("model.norm.weight") = {{kHidden}, DType::kQ8_0, std::string(34, 1)};
  const auto path = dir.Write("m.gguf", model.Gguf().Build());
  EXPECT_THAT(std::string(ModelSource::Open(path).status().message()),
              HasSubstr("output_norm.weight is Q8_0"));
}

TEST(ModelSourceTest, AWeightMayNotBeIntegers) {
  const TempDir dir;
  TinyModel model("llama", DType::kF32);
  model.tensors().at("lm_head.weight") = {{kVocab, kHidden}, DType::kU8,
                                          std::string(kVocab * kHidden, 1)};
  model.WriteDirectory(dir.path(), model.Config());
  EXPECT_THAT(std::string(ModelSource::Open(dir.path()).status().message()),
              HasSubstr("lm_head.weight is U8; F32, F16, BF16, F8_E4M3 with scales and bitsandbytes' NF4"));
}

TEST(ModelSourceTest, AHeadBesideATiedEmbeddingMustEqualIt) {
  const TempDir dir;
  TinyModel model("llama", DType::kF32);
  json config = model.Config();
  config["tie_word_embeddings"] = true;
  model.WriteDirectory(dir.path(), config);
  EXPECT_THAT(std::string(ModelSource::Open(dir.path()).status().message()),
              HasSubstr("lm_head.weight differs from model.embed_tokens.weight"));
  model.tensors()["lm_head.weight"] = model.tensors()["model.embed_tokens.weight"];
  model.WriteDirectory(dir.path(), config);
  const auto source = ModelSource::Open(dir.path());
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(&(*source)->weight(HeadModule(kLayers)), &(*source)->embedding());
}

TEST(ModelSourceTest, GenerationConfigNamesTheEndTokens) {
  const TempDir dir;
  const TinyModel model("llama", DType::kF32);
  model.WriteDirectory(dir.path(), model.Config());
  dir.Write("generation_config.json", R"({"eos_token_id":[7,5]})");
  const auto source = ModelSource::Open(dir.path());
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ((*source)->config().eos_ids, (std::vector<int32_t>{5, 7}));
  dir.Write("generation_config.json", R"({"eos_token_id":)");
  EXPECT_EQ(ModelSource::Open(dir.path()).status().code(), absl::StatusCode::kDataLoss);
}

TEST(ModelSourceTest, PathsWithoutAModelAreNamed) {
  const TempDir dir;
  const absl::Status none = ModelSource::Open(dir.path() / "none").status();
  EXPECT_EQ(none.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(none.message()), HasSubstr((dir.path() / "none").string()));
  const absl::Status empty = ModelSource::Open(dir.path()).status();
  EXPECT_EQ(empty.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(empty.message()), HasSubstr("config.json"));
  EXPECT_EQ(ModelSource::Open(dir.Write("notes.txt", "not a model")).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// tests/golden/models: written by Transformers, safetensors and gguf-py.
TEST(ModelSourceTest, OpensEveryGoldenModel) {
  int opened = 0;
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/models")) {
    const auto source = ModelSource::Open(entry.path());
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ((*source)->config().name,
              entry.is_directory() ? entry.path().filename() : entry.path().stem());
    ++opened;
  }
  EXPECT_GE(opened, 8);
}

std::filesystem::path RealModel() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::filesystem::path root = cache != nullptr  ? std::filesystem::path(cache)
                                     : home != nullptr ? std::filesystem::path(home) / ".cache"
                                                       : "";
  return root / "lorikeet" / "SmolLM2-135M-Instruct.Q4_1.gguf";
}

TEST(ModelSourceTest, OpensTheDefaultModel) {
  if (!std::filesystem::exists(RealModel())) GTEST_SKIP() << RealModel() << " is not there";
  const auto source = ModelSource::Open(RealModel());
  ASSERT_TRUE(source.ok()) << source.status();
  const ModelConfig& config = (*source)->config();
  EXPECT_EQ(config.family, "llama");
  EXPECT_EQ(config.layers, 30);
  EXPECT_EQ(config.hidden, 576);
  EXPECT_EQ(config.ffn, 1536);
  EXPECT_EQ(config.heads, 9);
  EXPECT_EQ(config.kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.vocab, 49152);
  EXPECT_TRUE(config.tied_head);
  EXPECT_EQ((*source)->embedding().dtype, DType::kQ8_0);
  EXPECT_EQ((*source)->weight(LayerModule(29, Linear::kDown)).dtype, DType::kQ4_1);
}

}  // namespace
}  // namespace lorikeet
