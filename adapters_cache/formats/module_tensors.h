// The tensors and settings of one linear, as a variant's lowering reads them: every access checks
// type and shape, and what nobody reads is found afterwards.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "adapters_cache/formats/matrix.h"
#include "adapters_cache/formats/peft_targets.h"
#include "adapters_cache/formats/raw_adapter.h"
#include "engine/api/base_model.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

// The names that were read.
struct UsedTensors {
  std::set<std::string> own, shared;
};

// Of one thread; those of other linears may be at work on others.
class ModuleTensors {
 public:
  using Tensors = std::map<std::string, RawTensor, std::less<>>;  // by parameter
  // What the linears of one load have in common.
  struct SharedFactors {
    std::mutex mutex;
    std::map<std::string, std::shared_ptr<const Matrix2>> by_name;
  };
  // Of the linear among those the adapter changes, in the model's order.
  struct Ordinal {
    int ordinal = 0;
    int count = 0;
  };

  // All arguments outlive it.
  ModuleTensors(const BaseModel& base, ModuleId id, Ordinal ordinal, const Tensors& own,
                const Tensors& shared, const nlohmann::ordered_json& config, UsedTensors* used,
                SharedFactors* shared_factors);

  const std::string& path() const { return path_; }
  int32_t in() const { return shape_.in; }
  int32_t out() const { return shape_.out; }
  int ordinal() const { return ordinal_.ordinal; }
  int count() const { return ordinal_.count; }
  const nlohmann::ordered_json& config() const { return config_; }

  bool Has(std::string_view name) const { return own_.contains(name); }
  bool HasShared(std::string_view name) const { return shared_.contains(name); }
  // Own tensors first, then shared ones. INVALID_ARGUMENT: absent, another shape (-1: any
  // dimension), an integer type.
  absl::StatusOr<std::vector<float>> Get(std::string_view name, std::vector<int64_t> shape) const;
  absl::StatusOr<Matrix2> GetMatrix(std::string_view name, int64_t rows, int64_t columns) const;
  absl::StatusOr<std::vector<int64_t>> GetIndices(std::string_view name,
                                                  std::vector<int64_t> shape) const;
  // The shape of a tensor of `dimensions` dimensions.
  absl::StatusOr<std::vector<int64_t>> ShapeOf(std::string_view name, size_t dimensions) const;
  size_t Dimensions(std::string_view name) const;  // of an own tensor; 0: absent
  // SHA-256 of type, shape and bytes. REQUIRES: the tensor was read.
  std::string HashOf(std::string_view name) const;
  // Marks a tensor that changes nothing at inference.
  void Ignore(std::string_view name) const;

  // What `make` makes for the first linear that asks for the name.
  absl::StatusOr<std::shared_ptr<const Matrix2>> SharedFactor(
      const std::string& name, const std::function<absl::StatusOr<Matrix2>()>& make) const;

  // Settings; a value of the wrong type is an error of status().
  double Number(const char* key, double fallback) const;
  bool Flag(const char* key, bool fallback) const;
  std::string Text(const char* key, const std::string& fallback) const;
  // `pattern_key`'s value for this linear, else `key`'s.
  double Patterned(const char* pattern_key, const char* key, double fallback) const;
  const absl::Status& status() const { return status_; }

  // The base's weight [out, in] and bias (empty: none).
  Matrix2 Weight() const;
  // Products with it, [., out] · W and W · [in, .], and its first columns, without a copy of the whole.
  Matrix2 TimesWeight(const Matrix2& left) const;
  Matrix2 WeightTimes(const Matrix2& right) const;
  Matrix2 WeightColumns(int64_t count) const;
  std::vector<float> Bias() const;
  // DoraOutScale of W + b · a.
  absl::StatusOr<std::vector<float>> DoraScale(const Matrix2& a, const Matrix2& b,
                                               const std::vector<float>& magnitude) const;

  absl::Status Invalid(const std::string& why) const;

 private:
  void ForPanels(const std::function<void(int64_t first, const Matrix2& rows)>& fn) const;
  absl::StatusOr<const RawTensor*> Find(std::string_view name) const;
  void WrongType(const char* key, const char* expected) const;

  const BaseModel& base_;
  const ModuleId id_;
  const std::string path_;
  const LinearShape shape_;
  const Ordinal ordinal_;
  const Tensors& own_;
  const Tensors& shared_;
  const nlohmann::ordered_json& config_;
  UsedTensors* const used_;
  SharedFactors* const shared_factors_;
  mutable absl::Status status_;
};

}  // namespace lorikeet
