// BaseModel over an open checkpoint.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/api/base_model.h"
#include "engine/model/model_source.h"

namespace lorikeet {

class BaseModelView final : public BaseModel {
 public:
  explicit BaseModelView(std::shared_ptr<const ModelSource> source) : source_(std::move(source)) {}

  int layers() const override { return source_->config().layers; }
  std::vector<ModuleId> modules() const override { return source_->modules(); }
  std::string path(ModuleId id) const override { return source_->path(id); }
  int experts() const override { return source_->config().experts; }
  LayerReplication layer_replication() const override { return source_->layer_replication(); }
  int32_t vocab_size() const override { return source_->config().vocab; }
  LinearShape shape(ModuleId id) const override;
  void ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const override;
  bool ReadBias(ModuleId id, float* out) const override;
  void ReadEmbedding(int32_t first_row, int32_t rows, float* out) const override;
  bool tied_head() const override { return source_->config().tied_head; }
  int32_t head_dim() const override { return source_->config().head_dim; }

 private:
  std::shared_ptr<const ModelSource> source_;
};

}  // namespace lorikeet
