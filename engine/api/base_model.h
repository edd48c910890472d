// What an adapter loader must know of the base model: shapes to check against, and the weights of
// one linear for variants whose normal form depends on them (DoRA's row norms).
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/layer_replication.h"
#include "engine/api/module.h"
#include "engine/base/check.h"

namespace lorikeet {

struct LinearShape {
  int32_t in = 0;
  int32_t out = 0;
};

// Thread-safe, immutable.
class BaseModel {
 public:
  virtual ~BaseModel() = default;

  virtual int layers() const = 0;
  virtual int32_t vocab_size() const = 0;
  // Every linear, layer by layer, the head last; what Hugging Face calls one of them.
  virtual std::vector<ModuleId> modules() const {
    std::vector<ModuleId> all(ModuleCount(layers()));
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  virtual std::string path(ModuleId id) const { return ModulePath(id, layers()); }
  virtual int experts() const { return 0; }  // of a layer that has any
  virtual LayerReplication layer_replication() const { return {}; }  // of which this model is made
  virtual LinearShape shape(ModuleId id) const = 0;

  // Rows [first_row, first_row + rows) of the linear's weight as the GEMM uses them, dequantised,
  // in Hugging Face row order. out: [rows, in].
  virtual void ReadRows(ModuleId id, int32_t first_row, int32_t rows, float* out) const = 0;

  // Whether the linear has a bias; writes it to `out` ([out] floats) unless that is nullptr. Needed
  // by adapters that replace biases; a model without any need not override it.
  virtual bool ReadBias(ModuleId id, float* out) const {
    static_cast<void>(id), static_cast<void>(out);
    return false;
  }

  // Rows of the input embedding, dequantised. out: [rows, D].
  virtual void ReadEmbedding(int32_t first_row, int32_t rows, float* out) const {
    static_cast<void>(first_row), static_cast<void>(rows), static_cast<void>(out);
    LK_CHECK_MSG(false, "this base model has no embedding");
  }
  virtual bool tied_head() const { return false; }
  virtual int32_t head_dim() const { return shape(LayerModule(0, Linear::kK)).out; }

  int32_t hidden() const { return shape(LayerModule(0, Linear::kQ)).in; }
};

}  // namespace lorikeet
