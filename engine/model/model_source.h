// A checkpoint, opened: configuration and canonical weights, whatever the file format.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/api/layer_replication.h"
#include "engine/api/module.h"
#include "engine/model/config.h"
#include "engine/tensor/gguf.h"
#include "engine/tensor/tensor_file.h"

namespace lorikeet {

// Per-layer vectors that are not linears.
struct LayerNorms {
  const TensorView* input = nullptr;           // [hidden]
  const TensorView* post_attention = nullptr;  // [hidden]
  const TensorView* q = nullptr;               // [head_dim] or nullptr
  const TensorView* k = nullptr;               // [head_dim] or nullptr
};

// Immutable, thread-safe; the views stay valid while the source lives. Their bytes are aligned to
// the type's scalars (4 for F32, else 2), and norms and biases are never quantised. The values are
// as the file has them: nobody has looked for NaN.
class ModelSource {
 public:
  // PATH is a GGUF file or a Hugging Face directory (config.json + *.safetensors).
  // NOT_FOUND: no such file. INVALID_ARGUMENT names an unknown architecture or setting, and all
  // missing tensors, shapes that do not fit the configuration and tensors that belong nowhere;
  // DATA_LOSS says a file is truncated or corrupt.
  // Its layers are stacked as `replication` says. INVALID_ARGUMENT: it names a layer that is not there.
  static absl::StatusOr<std::unique_ptr<ModelSource>> Open(const std::filesystem::path& path,
                                                           const LayerReplication& replication = {});

  virtual ~ModelSource() = default;

  const ModelConfig& config() const { return config_; }
  // Weight [out, in] and bias [out] (nullptr: none) in Hugging Face row order: rows that the file
  // holds permuted (q and k in a llama GGUF) come back in order. A tied head is the embedding.
  // REQUIRES: id is one of modules().
  const TensorView& weight(ModuleId id) const { return *weights_[id]; }
  const TensorView* bias(ModuleId id) const { return biases_[id]; }
  // The linears there are, layer by layer, the head last; and what Hugging Face calls one.
  std::vector<ModuleId> modules() const;
  std::string path(ModuleId id) const;
  const TensorView& embedding() const { return *embedding_; }  // [vocab, hidden]
  const TensorView& final_norm() const { return *final_norm_; }
  const LayerNorms& norms(int layer) const { return norms_[layer]; }
  const LayerReplication& layer_replication() const { return replication_; }
  // The first layer with the weights of this one, which is itself unless layers are replicated.
  int first_like(int layer) const { return replication_.empty() ? layer : first_like_[layer]; }
  // The GGUF metadata (tokenizer, chat template); nullptr for a directory.
  const GgufMetadata* gguf() const { return gguf_; }

 protected:
  absl::Status Replicate(const LayerReplication& replication, const std::string& where);

  ModelConfig config_;
  std::vector<const TensorView*> weights_;  // [ModuleCount(layers, experts)]; nullptr: no such linear
  std::vector<const TensorView*> biases_;
  std::vector<LayerNorms> norms_;  // [layers]
  const TensorView* embedding_ = nullptr;
  const TensorView* final_norm_ = nullptr;
  const GgufMetadata* gguf_ = nullptr;
  LayerReplication replication_;
  std::vector<int> first_like_;  // [layers] where layers are replicated
};

}  // namespace lorikeet
