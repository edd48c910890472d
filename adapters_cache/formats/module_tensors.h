// The tensors and settings of one linear, as a variant's lowering reads them: every access checks
// type and shape, and what nobody reads is found afterwards.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
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

class ModuleTensors {
 public:
  using Tensors = std::map<std::string, RawTensor, std::less<>>;  // by parameter
  // What the linears of one load have in common, by their shape.
  using SharedPairs = std::map<std::pair<int32_t, int32_t>, std::shared_ptr<const SharedPair>>;

  // `ordinal`: of the linear among those the adapter changes, in the model's order. All arguments
  // outlive it; names read are added to the sets.
  ModuleTensors(const BaseModel& base, ModuleId id, int ordinal, int count, const Tensors& own,
                const Tensors& shared, const nlohmann::ordered_json& config,
                std::set<std::string>* used_own, std::set<std::string>* used_shared,
                SharedPairs* shared_pairs);

  const std::string& path() const { return path_; }
  int32_t in() const { return shape_.in; }
  int32_t out() const { return shape_.out; }
  int ordinal() const { return ordinal_; }
  int count() const { return count_; }
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
  // Marks a tensor that changes nothing at inference.
  void Ignore(std::string_view name) const;

  // Of the linears of this one's shape; nullptr until the first of them has made it.
  std::shared_ptr<const SharedPair>& PairOfItsShape() const {
    return (*shared_pairs_)[{shape_.in, shape_.out}];
  }

  // Settings; a value of the wrong type is an error of status().
  double Number(const char* key, double fallback) const;
  bool Flag(const char* key, bool fallback) const;
  std::string Text(const char* key, const std::string& fallback) const;
  // `pattern_key`'s value for this linear, else `key`'s.
  double Patterned(const char* pattern_key, const char* key, double fallback) const;
  const absl::Status& status() const { return status_; }

  // The base's weight [out, in] and bias (empty: none).
  Matrix2 Weight() const;
  std::vector<float> Bias() const;

  absl::Status Invalid(const std::string& why) const;

 private:
  absl::StatusOr<const RawTensor*> Find(std::string_view name) const;
  void WrongType(const char* key, const char* expected) const;

  const BaseModel& base_;
  const ModuleId id_;
  const std::string path_;
  const LinearShape shape_;
  const int ordinal_;
  const int count_;
  const Tensors& own_;
  const Tensors& shared_;
  const nlohmann::ordered_json& config_;
  std::set<std::string>* const used_own_;
  std::set<std::string>* const used_shared_;
  SharedPairs* const shared_pairs_;
  mutable absl::Status status_;
};

}  // namespace lorikeet
