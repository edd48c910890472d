#include "adapters_cache/formats/peft_modules.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/common_parts.h"
#include "adapters_cache/formats/methods.h"
#include "adapters_cache/formats/peft_targets.h"

namespace lorikeet {
namespace {

constexpr ModuleMethod kMethods[] = {
    {"ADALORA", "adalora", "lora_",
     "r lora_alpha init_r target_r rank_pattern deltaT beta1 beta2 orth_reg_weight tinit tfinal "
     "total_step lora_dropout init_lora_weights use_dora use_rslora alpha_pattern qalora_group_size lora_bias", LowerAdaLora},
    {"BEFT", "beft", "beft_", "", LowerBeft},
    {"BOFT", "boft", "boft_", "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout",
     LowerBoft},
    {"BONE", "miss", "bone_", "r bat", LowerMiss},
    {"C3A", "c3a", "c3a_", "block_size block_size_pattern init_weights", LowerC3a},
    {"DEFT", "deft", "deft_", "r alpha decomposition_method para rank_pattern alpha_pattern deft_dropout init_scale", LowerDeft},
    {"DELORA", "delora", "delora_", "r delora_lambda rank_pattern lambda_pattern", LowerDelora},
    {"FOURIERFT", "fourierft", "fourierft_",
     "n_frequency scaling random_loc_seed n_frequency_pattern alpha ifft2_norm", LowerFourierFt},
    {"FROD", "frod", "frod_",
     "frod_dropout projection_prng_key save_projection sparse_rate regularization_alpha progressbar "
     "runtime_offload_base_weight", LowerFrod},
    {"GLORA", "glora", "glora_", "r config_A_B config_C config_D_E", LowerGlora},
    {"GRALORA", "gralora", "gralora_", "r hybrid_r alpha gralora_k gralora_dropout", LowerGralora},
    {"HIRA", "hira", "hira_", "r rank_pattern hira_dropout", LowerHira, true},
    {"HRA", "hra", "hra_", "r apply_GS", LowerHra},
    {"IA3", "ia3", "ia3_", "feedforward_modules init_ia3_weights", LowerIa3},
    {"LOHA", "loha", "hada_", "r alpha rank_pattern alpha_pattern rank_dropout use_effective_conv2d",
     LowerLoha},
    {"LOKR", "lokr", "lokr_",
     "r alpha rank_pattern alpha_pattern rank_dropout use_effective_conv2d decompose_both "
     "decompose_factor rank_dropout_scale", LowerLokr},
    {"LORETTA", "loretta", "lora_", "r lora_alpha lora_dropout", LowerLoretta},
    {"MISS", "miss", "miss_", "r mini_r miss_dropout", LowerMiss},
    {"OFT", "oft", "oft_",
     "r oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms", LowerOft, true},
    {"OSF", "osf", "osf_", "effective_rank rank_pattern target_svd_config", LowerOsf},
    {"PEANUT", "peanut", "peanut_", "r depth act_fn scaling", LowerPeanut},
    {"POLY", "poly", "poly_", "r poly_type n_tasks n_skills n_splits task_id", LowerPoly},
    {"PVERA", "pvera", "pvera_",
     "r projection_prng_key save_projection pvera_dropout d_initial sample_at_inference", LowerVera},
    {"RANDLORA", "randlora", "randlora_",
     "r randlora_alpha projection_prng_key save_projection sparse very_sparse randlora_dropout",
     LowerRandLora},
    {"ROAD", "road", "road_", "variant group_size init_weights", LowerRoad},
    {"SHIRA", "shira", "shira_", "r mask_type random_seed", LowerShira},
    {"SUPERTUNING", "supertuning", "supertuning_",
     "sparsity select_top lora_alpha lora_dropout r save_precomputed_indices", LowerSuperTuning},
    {"TIED_LORA", "tied_lora", "tied_lora_", "r lora_alpha lora_dropout", LowerTiedLora},
    {"TINYLORA", "tinylora", "tinylora_", "r u weight_tying projection_seed save_projection init_v_bound tinylora_dropout",
     LowerTinyLora, true},
    {"UNILORA", "unilora", "unilora_", "r theta_d_length proj_seed save_indices init_theta_d_bound unilora_dropout",
     LowerUniLora},
    {"VBLORA", "vblora", "vblora_",
     "r num_vectors vector_length topk save_only_topk_weights vblora_dropout "
     "init_vector_bank_bound init_logits_std", LowerVbLora},
    {"VERA", "vera", "vera_", "r projection_prng_key save_projection vera_dropout d_initial",
     LowerVera},
    {"WAVEFT", "waveft", "waveft_",
     "n_frequency scaling random_loc_seed n_frequency_pattern wavelet_family use_idwt "
     "proportional_parameters", LowerWaveFt},
};

class ModulesReader {
 public:
  ModulesReader(const ModuleMethod& method, const AdapterFiles& files, RawAdapter* raw,
                Problems* problems)
      : method_(method),
        infix_(absl::StrCat(".", std::string(method.prefix))),
        files_(files),
        raw_(raw),
        problems_(problems),
        common_(files.config, MethodName(method), raw, problems) {}

  void Read() {
    raw_->variant = std::string(method_.variant);
    raw_->lower = method_.lower;
    if (method_.embeddings) raw_->lower_embedding = method_.lower;
    WarnOfUnknownKeys(files_.config, method_.keys, raw_);
    auto targets = PeftTargets::Parse(files_.config, problems_);
    std::vector<std::string> unused;
    for (const auto& [name, view] : files_.tensors.tensors()) {
      if (!Place(name, view)) unused.push_back(name);
    }
    if (!unused.empty()) {
      problems_->Invalid(absl::StrCat(unused.size(), " tensors have no place in this adapter: ",
                                      ListNames(unused)));
    }
    if (raw_->modules.empty() && raw_->shared.empty() && problems_->empty()) {
      problems_->Invalid("the file holds no tensors of " + std::string(method_.peft_type));
    }
    if (!targets.stated()) return;
    raw_->targets = [targets = std::move(targets)](std::string_view path) {
      return targets.Match(path);
    };
  }

 private:
  static std::string MethodName(const ModuleMethod& method) {
    return std::string(method.prefix.substr(0, method.prefix.find('_')));
  }

  bool Place(const std::string& name, const TensorView& view) {
    const std::string canonical = CanonicalName(name);
    if (std::string_view(canonical).starts_with(method_.prefix)) {
      return raw_->shared.emplace(canonical, RawTensor{name, view}).second;
    }
    const size_t at = canonical.find(infix_);
    if (at == std::string::npos) return common_.Place(canonical, name, view);
    auto& tensors = raw_->modules[canonical.substr(0, at)].tensors;
    return tensors.emplace(canonical.substr(at + 1), RawTensor{name, view}).second;
  }

  const ModuleMethod& method_;
  const std::string infix_;
  const AdapterFiles& files_;
  RawAdapter* raw_;
  Problems* problems_;
  CommonParts common_;
};

}  // namespace

const ModuleMethod* FindModuleMethod(std::string_view peft_type) {
  const auto it = std::find_if(std::begin(kMethods), std::end(kMethods), [&](const auto& method) {
    return method.peft_type == peft_type;
  });
  return it == std::end(kMethods) ? nullptr : it;
}

void ParsePeftModules(const ModuleMethod& method, const AdapterFiles& files, RawAdapter* raw,
                      Problems* problems) {
  ModulesReader(method, files, raw, problems).Read();
}

}  // namespace lorikeet
