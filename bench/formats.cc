#include "bench/formats.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace lorikeet::bench {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kPrefix[] = "base_model.model.";
constexpr int64_t kMatrix = 2, kFloat = 4, kEntry = 8;  // bytes: a value, a value of a vector, a value with its column

class Maker {
 public:
  explicit Maker(const BaseModel& base) : base_(base) {}

  // One tensor of a linear: "lora_A.weight" and so on.
  struct Part {
    std::string parameter;
    std::vector<int64_t> shape;
    DType dtype = DType::kF32;
    std::function<int64_t(int64_t i)> integer = nullptr;
  };
  struct OfLinear {
    std::vector<Part> parts;
    int64_t own_bytes = 0;
  };
  using Fill = std::function<OfLinear(int64_t in, int64_t out)>;

  // The same on the linears of every layer that `targets` names ("q" for q_proj); "" names all.
  Format& Linears(const std::string& name, Json config, std::string_view targets, const Fill& fill) {
    Format& format = Add(name, std::move(config));
    for (const ModuleId id : base_.modules()) {
      const std::string path = base_.path(id);
      const std::string last = path.substr(path.rfind('.') + 1);
      if (id == HeadModule(base_.layers())) continue;
      if (!targets.empty() && targets.find(last) == std::string_view::npos) continue;
      const OfLinear made = fill(base_.shape(id).in, base_.shape(id).out);
      for (const Part& part : made.parts) {
        format.tensors.push_back({absl::StrCat(kPrefix, path, ".", part.parameter), part.dtype,
                                  part.shape, part.integer});
      }
      format.own_bytes += made.own_bytes;
    }
    return format;
  }

  Format& Add(const std::string& name, Json config) {
    Format& format = all.emplace_back();
    format.name = name;
    format.config = std::move(config);
    if (format.config.contains("peft_type")) format.config["task_type"] = "CAUSAL_LM";
    return format;
  }

  std::deque<Format> all;  // references to them stay

 private:
  const BaseModel& base_;
};

constexpr char kQv[] = "q_proj v_proj";

Json Peft(const char* type, const Json& rest = Json::object()) {
  Json config = {{"peft_type", type}};
  config.update(rest);
  return config;
}

Maker::OfLinear Pair(const std::string& a, const std::string& b, int64_t r, int64_t in, int64_t out,
                     DType dtype = DType::kF32) {
  return {{{a, {r, in}, dtype}, {b, {out, r}, dtype}}, kMatrix * r * (in + out)};
}

void AddLora(Maker* maker) {
  const Json config = Peft("LORA", {{"r", 16}, {"lora_alpha", 32}});
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    maker->Linears(absl::StrCat("LoRA, r16, ", Info(dtype).name), config, "",
                   [dtype](int64_t in, int64_t out) {
                     return Pair("lora_A.weight", "lora_B.weight", 16, in, out, dtype);
                   }).copied = true;
  }
  Json dora = config;
  dora["use_dora"] = true;
  maker->Linears("DoRA, r16", dora, "", [](int64_t in, int64_t out) {
    Maker::OfLinear made = Pair("lora_A.weight", "lora_B.weight", 16, in, out);
    made.parts.push_back({"lora_magnitude_vector", {out}});
    made.own_bytes += kFloat * out;
    return made;
  });
  Json arrow = config;
  arrow["target_modules"] = "all-linear";
  arrow["arrow_config"] = {{"top_k", 2}, {"router_temperature", 1.0}, {"use_gks", false}};
  constexpr int kExperts = 8;
  for (int e = 0; e < kExperts; ++e) arrow["arrow_config"]["task_adapter_names"].push_back(absl::StrCat("task_", e));
  Format& router = maker->Linears("Arrow, 8 of r16, BF16", arrow, "", [](int64_t in, int64_t out) {
    return Pair("lora_A.weight", "lora_B.weight", 16, in, out, DType::kBF16);
  });
  router.experts = kExperts;
  router.own_bytes *= kExperts;
  Json olora = config;
  olora["init_lora_weights"] = "olora";
  maker->Linears("OLoRA, r16", olora, "", [](int64_t in, int64_t out) {
    Maker::OfLinear made = Pair("lora_A.weight", "lora_B.weight", 16, in, out);
    made.own_bytes *= 2;  // and what the training took from W
    return made;
  });
  maker->Linears("LoRA-XS, r64", Peft("LORA", {{"r", 64}}), "", [](int64_t in, int64_t out) {
    Maker::OfLinear made = Pair("lora_A.weight", "lora_B.weight", 64, in, out);
    made.parts.push_back({"default_lora_latent_mapping.weight", {64, 64}});
    return made;
  });
  maker->Linears("AdaLoRA, r12", Peft("ADALORA", {{"init_r", 12}, {"lora_alpha", 32}}), "",
                 [](int64_t in, int64_t out) {
                   Maker::OfLinear made = Pair("lora_A", "lora_B", 12, in, out);
                   made.parts.push_back({"lora_E", {12, 1}});
                   return made;
                 });
}

// Pairs that most adapters of the kind share, or that a few values make.
void AddShared(Maker* maker, int64_t widest) {
  Format& vera = maker->Linears("VeRA, r256", Peft("VERA", {{"r", 256}}), "", [](int64_t, int64_t out) {
    return Maker::OfLinear{{{"vera_lambda_d", {256}}, {"vera_lambda_b", {out}}}, kFloat * (256 + out)};
  });
  vera.own_bytes += kMatrix * 2 * 256 * widest;
  vera.tensors.push_back({"base_model.vera_A", DType::kF32, {256, widest}});
  vera.tensors.push_back({"base_model.vera_B", DType::kF32, {widest, 256}});

  Format& tiny = maker->Linears("TinyLoRA, r2", Peft("TINYLORA", {{"r", 2}, {"u", 64}, {"weight_tying", 1.0}}), "",
                 [](int64_t in, int64_t out) {
                   Maker::OfLinear made = Pair("tinylora_A", "tinylora_B", 2, in, out);
                   made.parts.push_back({"tinylora_P", {64, 2, 2}});
                   return made;
                 });
  tiny.tensors.push_back({"base_model.tinylora_v.0", DType::kF32, {64}});

  Format& vb = maker->Linears(
      "VB-LoRA, r4, 256 x 256", Peft("VBLORA", {{"r", 4}, {"num_vectors", 256}, {"vector_length", 256}, {"topk", 2}}),
      "", [](int64_t in, int64_t out) {
        const auto vector = [](int64_t i) { return i * 37 % 256; };
        return Maker::OfLinear{{{"vblora_logits_A_topk_indices", {4, in / 256, 2}, DType::kU8, vector},
                                {"vblora_logits_A_topk_weights", {4, in / 256, 1}},
                                {"vblora_logits_B_topk_indices", {out / 256, 4, 2}, DType::kU8, vector},
                                {"vblora_logits_B_topk_weights", {out / 256, 4, 1}}},
                               kMatrix * 4 * (in + out)};
      });
  vb.tensors.push_back({"base_model.vblora_vector_bank", DType::kF32, {256, 256}});

  Format& uni = maker->Linears("Uni-LoRA, r4", Peft("UNILORA", {{"r", 4}}), "", [](int64_t in, int64_t out) {
    const auto index = [](int64_t i) { return i * 37 % 65536; };
    Maker::OfLinear made = Pair("unilora_scales_A", "unilora_scales_B", 4, in, out);
    made.parts.push_back({"unilora_indices_A", {4, in}, DType::kI64, index});
    made.parts.push_back({"unilora_indices_B", {out, 4}, DType::kI64, index});
    return made;
  });
  uni.tensors.push_back({"base_model.unilora_theta_d", DType::kF32, {65536}});

  Format& tied = maker->Linears("Tied-LoRA, r64", Peft("TIED_LORA", {{"r", 64}, {"lora_alpha", 64}}), "",
                                [](int64_t, int64_t out) {
                                  return Maker::OfLinear{{{"tied_lora_u", {64}}, {"tied_lora_v", {out}}}, kFloat * (64 + out)};
                                });
  tied.own_bytes += kMatrix * 2 * 64 * widest;
  tied.tensors.push_back({"base_model.tied_lora_A", DType::kF32, {64, widest}});
  tied.tensors.push_back({"base_model.tied_lora_B", DType::kF32, {widest, 64}});

  Format& rand = maker->Linears("RandLoRA, r32, q and v", Peft("RANDLORA", {{"r", 32}, {"randlora_alpha", 640}}),
                                kQv, [](int64_t in, int64_t out) {
                                  const int64_t low = std::min(in, out), n = (low + 31) / 32;
                                  return Maker::OfLinear{{{"randlora_lambda", {32, n}}, {"randlora_gamma", {n, low}}},
                                                         kMatrix * in * out};
                                });
  rand.tensors.push_back({"base_model.randlora_A", DType::kF32, {32, 1, 4096}});
  rand.tensors.push_back({"base_model.randlora_B", DType::kF32, {4096, 128, 32}});
}

void AddLowRank(Maker* maker) {
  maker->Linears("LoHa, r8", Peft("LOHA", {{"r", 8}, {"alpha", 16}}), "", [](int64_t in, int64_t out) {
    return Maker::OfLinear{{{"hada_w1_a", {out, 8}}, {"hada_w1_b", {8, in}}, {"hada_w2_a", {out, 8}},
                            {"hada_w2_b", {8, in}}},
                           kMatrix * 64 * (in + out)};
  });
  maker->Linears("DeLoRA, r16", Peft("DELORA", {{"r", 16}}), "", [](int64_t in, int64_t out) {
    Maker::OfLinear made = Pair("delora_A", "delora_B", 16, in, out);
    made.parts.push_back({"delora_lambda", {1}});
    made.parts.push_back({"delora_w_norm", {in}});
    return made;
  });
  maker->Linears("GraLoRA, r32, k2", Peft("GRALORA", {{"r", 32}, {"alpha", 64}, {"gralora_k", 2}, {"hybrid_r", 0}}),
                 "", [](int64_t in, int64_t out) {
                   return Maker::OfLinear{{{"gralora_A", {2, in / 2, 32}}, {"gralora_B", {2, 32, out / 2}}},
                                          kMatrix * 32 * (in + out)};
                 });
  maker->Linears("MiSS, r64", Peft("MISS", {{"r", 64}, {"init_weights", true}}), "", [](int64_t, int64_t out) {
    return Maker::OfLinear{{{"miss_block", {64, out}}}, kMatrix * 64 * out};
  });
  // Widths are products of 64 and of 64 or 224; cores of rank 5.
  maker->Linears("LoRETTA, r16", Peft("LORETTA", {{"r", 16}, {"lora_alpha", 16}}), "", [](int64_t in, int64_t out) {
    return Maker::OfLinear{{{"lora_A.cores.0", {1, 64, 5}}, {"lora_A.cores.1", {5, in / 64, 5}}, {"lora_A.cores.2", {5, 16, 1}},
                            {"lora_B.cores.0", {1, 16, 5}}, {"lora_B.cores.1", {5, 64, 5}}, {"lora_B.cores.2", {5, out / 64, 1}}},
                           kMatrix * 16 * (in + out)};
  });
  maker->Linears("HRA, r8", Peft("HRA", {{"r", 8}}), "", [](int64_t in, int64_t) {
    return Maker::OfLinear{{{"hra_u", {in, 8}}}, kMatrix * 8 * in};
  });
  maker->Linears("DEFT, r16, q and v", Peft("DEFT", {{"r", 16}, {"decomposition_method", "relu"}}), kQv,
                 [](int64_t in, int64_t out) { return Maker::OfLinear{{{"deft_P", {out, 16}}, {"deft_R", {16, in}}}, kMatrix * 16 * (in + out)}; });
}

// The two factors of a width that lie closest to its root.
std::pair<int64_t, int64_t> Factors(int64_t width) {
  int64_t small = 1;
  for (int64_t f = 1; f * f <= width; ++f) small = width % f == 0 ? f : small;
  return {small, width / small};
}

void AddStructured(Maker* maker) {
  maker->Linears("LoKr, full factors", Peft("LOKR", {{"r", 10000}, {"alpha", 10000}}), "", [](int64_t in, int64_t out) {
    const auto [o1, o2] = Factors(out);
    const auto [i1, i2] = Factors(in);
    return Maker::OfLinear{{{"lokr_w1", {o1, i1}}, {"lokr_w2", {o2, i2}}}, kMatrix * (o1 * i1 + o2 * i2)};
  });
  maker->Linears("IA3, k and v", Peft("IA3", {{"feedforward_modules", Json::array()}}), "k_proj v_proj",
                 [](int64_t, int64_t out) { return Maker::OfLinear{{{"ia3_l", {out, 1}}}, kFloat * out}; });
  maker->Linears("BEFT, q and v", Peft("BEFT"), kQv,
                 [](int64_t, int64_t out) { return Maker::OfLinear{{{"beft_bias", {1, out}}}, kFloat * out}; });
  maker->Linears("OFT, blocks of 32", Peft("OFT", {{"oft_block_size", 32}, {"r", 0}}), "", [](int64_t in, int64_t) {
    return Maker::OfLinear{{{"oft_R.weight", {in / 32, 32 * 31 / 2}}}, kMatrix * in * 32};
  });
  maker->Linears("BOFT, blocks of 8", Peft("BOFT", {{"boft_block_size", 8}, {"boft_n_butterfly_factor", 1}}), "",
                 [](int64_t in, int64_t out) {
                   return Maker::OfLinear{{{"boft_R", {1, in / 8, 8, 8}}, {"boft_s", {out, 1}}},
                                          kMatrix * in * 8 + kFloat * out};
                 });
  maker->Linears("RoAd 1", Peft("ROAD", {{"variant", "road_1"}, {"group_size", 64}}), "", [](int64_t, int64_t out) {
    return Maker::OfLinear{{{"road_theta", {out / 2}}, {"road_alpha", {out / 2}}}, kFloat * 2 * out};
  });
  maker->Linears("C3A, blocks of 256", Peft("C3A", {{"block_size", 256}}), "", [](int64_t in, int64_t out) {
    return Maker::OfLinear{{{"c3a_kernel", {out / 256, in / 256, 256}}}, kMatrix * in * out / 256};
  });
  maker->Linears("SHiRA, r16", Peft("SHIRA", {{"r", 16}}), "", [](int64_t in, int64_t out) {
    const int64_t n = 16 * (in + out), step = in * out / n;
    const auto place = [=](int64_t i) { return i < n ? i * step / in : (i - n) * step % in; };
    return Maker::OfLinear{{{"shira_weight", {n}}, {"shira_indices", {2, n}, DType::kI32, place}}, kEntry * n};
  });
  maker->Linears("FourierFT, q and v", Peft("FOURIERFT", {{"n_frequency", 1000}, {"scaling", 150}}), kQv,
                 [](int64_t in, int64_t out) {
                   return Maker::OfLinear{{{"fourierft_spectrum", {1000}}}, kMatrix * in * out};
                 });
  maker->Linears("HiRA, r32, q and v", Peft("HIRA", {{"r", 32}}), kQv, [](int64_t in, int64_t out) {
    return Maker::OfLinear{{{"hira_A", {32, in}}, {"hira_B", {out, 32}}}, kMatrix * in * out};
  });
}

// What changes the model beside its linears.
void AddOfModel(Maker* maker, int64_t layers, int64_t hidden, int64_t kv_width) {
  const auto tensor = [](std::string name, std::vector<int64_t> shape) {
    return FileTensor{std::move(name), DType::kF32, std::move(shape)};
  };
  Format& norms = maker->Add("LN tuning", Peft("LN_TUNING"));
  for (int64_t l = 0; l < layers; ++l) {
    for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
      norms.tensors.push_back(tensor(
          absl::StrCat(kPrefix, "model.layers.", l, ".", norm, ".ln_tuning_layers.weight"), {hidden}));
    }
  }
  norms.own_bytes = kFloat * 2 * layers * hidden;

  Format& prompt = maker->Add("prompt tuning, 64", Peft("PROMPT_TUNING", {{"num_virtual_tokens", 64}, {"token_dim", hidden}}));
  prompt.tensors.push_back(tensor("prompt_embeddings", {64, hidden}));
  prompt.own_bytes = kMatrix * 64 * hidden;

  Format& prefix = maker->Add("prefix tuning, 64",
                              Peft("PREFIX_TUNING", {{"num_virtual_tokens", 64}, {"token_dim", kv_width},
                                                     {"num_layers", layers}, {"num_attention_heads", kv_width / 128}}));
  prefix.tensors.push_back(tensor("prompt_embeddings", {64, layers * 2 * kv_width}));
  prefix.own_bytes = kMatrix * 64 * layers * 2 * kv_width;

  Format& adaption = maker->Add("adaption prompt, 10", Peft("ADAPTION_PROMPT", {{"adapter_layers", layers}, {"adapter_len", 10},
                                                                             {"target_modules", "self_attn"}}));
  Format& houlsby = maker->Add("Houlsby, 256 wide", {});
  houlsby.config = {{"model_type", "llama"}, {"hidden_size", hidden}, {"version", "adapters.1.3.0"},
                    {"config", {{"mh_adapter", true}, {"output_adapter", true}, {"is_parallel", false},
                                {"original_ln_before", false}, {"original_ln_after", true},
                                {"non_linearity", "swish"}, {"reduction_factor", hidden / 256}, {"scaling", 1.0},
                                {"residual_before_ln", true}, {"phm_layer", false}, {"inv_adapter", nullptr}}}};
  for (int64_t l = 0; l < layers; ++l) {
    const std::string layer = absl::StrCat("model.layers.", l, ".");
    const std::string attention = absl::StrCat(kPrefix, layer, "self_attn.adaption_");
    adaption.tensors.push_back(tensor(attention + "prompt", {1, 10, hidden}));
    adaption.tensors.push_back(tensor(attention + "gate", {1}));
    for (const char* site : {"attention_adapters", "output_adapters"}) {
      const std::string path = absl::StrCat(layer, site, ".adapters.a.");
      houlsby.tensors.push_back(tensor(path + "adapter_down.0.weight", {256, hidden}));
      houlsby.tensors.push_back(tensor(path + "adapter_down.0.bias", {256}));
      houlsby.tensors.push_back(tensor(path + "adapter_up.weight", {hidden, 256}));
      houlsby.tensors.push_back(tensor(path + "adapter_up.bias", {hidden}));
    }
  }
  adaption.own_bytes = kMatrix * layers * 10 * hidden;
  houlsby.own_bytes = layers * 2 * (kMatrix * 2 * 256 * hidden + kFloat * (256 + hidden));
}

// Values that fit their type: floats of about 0.01, integers as the tensor says.
void WriteValues(const FileTensor& tensor, int64_t count, std::ofstream* out) {
  std::vector<std::byte> row(ByteSize(tensor.dtype, std::min<int64_t>(count, 1 << 16)));
  uint32_t random = 1;
  for (int64_t begin = 0; begin < count; begin += 1 << 16) {
    const int64_t end = std::min<int64_t>(count, begin + (1 << 16));
    for (int64_t i = begin; i < end; ++i) {
      random = random * 1664525 + 1013904223;
      const float value = 0.01f * (static_cast<float>(random >> 8) / (1 << 23) - 1);
      const int64_t integer = tensor.integer ? tensor.integer(i) : 0;
      std::byte* to = &row[ByteSize(tensor.dtype, i - begin)];
      const uint16_t bits = tensor.dtype == DType::kBF16 ? FloatToBF16(value) : FloatToF16(value);
      if (tensor.integer) std::memcpy(to, &integer, ByteSize(tensor.dtype, 1));
      else if (tensor.dtype == DType::kF32) std::memcpy(to, &value, sizeof(value));
      else std::memcpy(to, &bits, sizeof(bits));
    }
    out->write(reinterpret_cast<const char*>(row.data()), ByteSize(tensor.dtype, end - begin));
  }
}

}  // namespace

int64_t WriteFormat(const Format& format, const fs::path& directory) {
  int64_t of_experts = 0;
  for (int e = 0; e < format.experts; ++e) {
    Format expert{.config = format.config, .tensors = format.tensors};
    expert.config.erase("arrow_config");
    of_experts += WriteFormat(expert, directory / absl::StrCat("task_", e));
  }
  fs::create_directories(directory);
  std::ofstream(directory / "adapter_config.json") << format.config.dump();
  Json header = Json::object();
  int64_t at = 0;
  for (const FileTensor& tensor : format.tensors) {
    int64_t count = 1;
    for (const int64_t d : tensor.shape) count *= d;
    const int64_t end = at + ByteSize(tensor.dtype, count);
    header[tensor.name] = {{"dtype", Info(tensor.dtype).name}, {"shape", tensor.shape},
                           {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  std::ofstream out(directory / "adapter_model.safetensors", std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), sizeof(length));
  out << text;
  for (const FileTensor& tensor : format.tensors) {
    int64_t count = 1;
    for (const int64_t d : tensor.shape) count *= d;
    WriteValues(tensor, count, &out);
  }
  LK_CHECK(out.good());
  return at + of_experts;
}

std::vector<Format> Formats(const BaseModel& base) {
  Maker maker(base);
  AddLora(&maker);
  const int64_t widest = base.shape(LayerModule(0, Linear::kDown)).in;
  AddShared(&maker, widest);
  AddLowRank(&maker);
  AddStructured(&maker);
  AddOfModel(&maker, base.layers(), base.hidden(), base.shape(LayerModule(0, Linear::kK)).out);
  return {std::make_move_iterator(maker.all.begin()), std::make_move_iterator(maker.all.end())};
}

}  // namespace lorikeet::bench
