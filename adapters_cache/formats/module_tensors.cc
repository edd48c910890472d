#include "adapters_cache/formats/module_tensors.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "adapters_cache/formats/dora.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/sha256.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"

namespace lorikeet {
namespace {

bool Fits(const std::vector<int64_t>& shape, const std::vector<int64_t>& expected) {
  return std::equal(shape.begin(), shape.end(), expected.begin(), expected.end(),
                    [](int64_t found, int64_t wanted) { return wanted < 0 || found == wanted; });
}

std::string ExpectedShape(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t d : shape) {
    absl::StrAppend(&text, text.empty() ? "[" : ", ", d < 0 ? "any" : absl::StrCat(d));
  }
  return text + "]";
}

}  // namespace

ModuleTensors::ModuleTensors(const BaseModel& base, ModuleId id, Ordinal ordinal, const Tensors& own,
                             const Tensors& shared, const nlohmann::ordered_json& config,
                             UsedTensors* used, SharedFactors* shared_factors)
    : base_(base),
      id_(id),
      path_(base.path(id)),
      shape_(base.shape(id)),
      ordinal_(ordinal),
      own_(own),
      shared_(shared),
      config_(config),
      used_(used),
      shared_factors_(shared_factors) {}

absl::Status ModuleTensors::Invalid(const std::string& why) const {
  return absl::InvalidArgumentError(absl::StrCat(path_, ": ", why));
}

absl::StatusOr<const RawTensor*> ModuleTensors::Find(std::string_view name) const {
  const bool is_own = own_.contains(name);
  const Tensors& tensors = is_own ? own_ : shared_;
  const auto it = tensors.find(name);
  if (it == tensors.end()) return Invalid("no tensor " + std::string(name));
  if (is_own) used_->own.insert(std::string(name));
  if (shared_.contains(name)) used_->shared.insert(std::string(name));  // a copy of every module's
  return &it->second;
}

absl::StatusOr<std::vector<float>> ModuleTensors::Get(std::string_view name,
                                                      std::vector<int64_t> shape) const {
  LK_ASSIGN_OR_RETURN(const RawTensor* tensor, Find(name));
  const TensorView& view = tensor->view;
  if (!Fits(view.shape, shape)) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->name, " is ", ShapeString(view.shape),
                                                   "; ", path_, " [", out(), ", ", in(),
                                                   "] of the base model needs ",
                                                   ExpectedShape(shape)));
  }
  if (IsCode(view.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor->name, " is ", Info(view.dtype).name, ", not of floats"));
  }
  LK_RETURN_IF_ERROR(CheckFinite(tensor->name, view));
  std::vector<float> values(view.elements());
  Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
  return values;
}

absl::StatusOr<Matrix2> ModuleTensors::GetMatrix(std::string_view name, int64_t rows,
                                                 int64_t columns) const {
  LK_ASSIGN_OR_RETURN(std::vector<float> values, Get(name, {rows, columns}));
  const std::vector<int64_t>& shape = (*Find(name))->view.shape;
  return Matrix2(shape[0], shape[1], std::move(values));
}

absl::StatusOr<std::vector<int64_t>> ModuleTensors::GetIndices(std::string_view name,
                                                               std::vector<int64_t> shape) const {
  LK_ASSIGN_OR_RETURN(const RawTensor* tensor, Find(name));
  if (!Fits(tensor->view.shape, shape)) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->name, " is ",
                                                   ShapeString(tensor->view.shape), "; expected ",
                                                   ExpectedShape(shape)));
  }
  return ReadIndices(tensor->name, tensor->view);
}

absl::StatusOr<std::vector<int64_t>> ModuleTensors::ShapeOf(std::string_view name,
                                                            size_t dimensions) const {
  LK_ASSIGN_OR_RETURN(const RawTensor* tensor, Find(name));
  const std::vector<int64_t>& shape = tensor->view.shape;
  if (shape.size() == dimensions && std::find(shape.begin(), shape.end(), 0) == shape.end()) {
    return shape;
  }
  return absl::InvalidArgumentError(absl::StrCat(tensor->name, " is ", ShapeString(shape),
                                                 "; it must have ", dimensions,
                                                 " dimensions, none of them 0"));
}

size_t ModuleTensors::Dimensions(std::string_view name) const {
  const auto it = own_.find(name);
  return it == own_.end() ? 0 : it->second.view.shape.size();
}

absl::StatusOr<std::shared_ptr<const Matrix2>> ModuleTensors::SharedFactor(
    const std::string& name, const std::function<absl::StatusOr<Matrix2>()>& make) const {
  std::lock_guard lock(shared_factors_->mutex);
  std::shared_ptr<const Matrix2>& factor = shared_factors_->by_name[name];
  if (factor == nullptr) {
    LK_ASSIGN_OR_RETURN(Matrix2 made, make());
    factor = std::make_shared<Matrix2>(std::move(made));
  }
  return factor;
}

std::string ModuleTensors::HashOf(std::string_view name) const {
  const TensorView& view = (*Find(name))->view;
  Sha256 hash;
  hash.Add(Info(view.dtype).name);
  hash.Add(ShapeString(view.shape));
  hash.Add(view.bytes.data(), view.bytes.size());
  return hash.Hex();
}

void ModuleTensors::Ignore(std::string_view name) const {
  if (own_.contains(name)) used_->own.insert(std::string(name));
}

void ModuleTensors::WrongType(const char* key, const char* expected) const {
  if (status_.ok()) {
    status_ = absl::InvalidArgumentError(
        absl::StrCat(key, " is ", config_.at(key).dump(), ", not ", expected));
  }
}

double ModuleTensors::Number(const char* key, double fallback) const {
  const auto it = config_.find(key);
  if (it == config_.end() || it->is_null()) return fallback;
  if (it->is_number() && std::isfinite(it->get<double>())) return it->get<double>();
  WrongType(key, "a number");
  return fallback;
}

bool ModuleTensors::Flag(const char* key, bool fallback) const {
  const auto it = config_.find(key);
  if (it == config_.end() || it->is_null()) return fallback;
  if (it->is_boolean()) return it->get<bool>();
  WrongType(key, "true or false");
  return fallback;
}

std::string ModuleTensors::Text(const char* key, const std::string& fallback) const {
  const auto it = config_.find(key);
  if (it == config_.end() || it->is_null()) return fallback;
  if (it->is_string()) return it->get<std::string>();
  WrongType(key, "a string");
  return fallback;
}

double ModuleTensors::Patterned(const char* pattern_key, const char* key, double fallback) const {
  Problems problems;
  const auto patterns = PeftPatternValues::Parse(config_, pattern_key, &problems);
  if (!problems.empty() && status_.ok()) status_ = problems.ToStatus();
  const std::optional<double> found = patterns.Find(path_);
  return found.has_value() ? *found : Number(key, fallback);
}

Matrix2 ModuleTensors::Weight() const {
  Matrix2 weight(out(), in());
  base_.ReadRows(id_, 0, out(), weight.values.data());
  return weight;
}

// Rows of the weight, as many at a time as stay in cache.
void ModuleTensors::ForPanels(const std::function<void(int64_t first, const Matrix2& rows)>& fn) const {
  constexpr int32_t kPanelElements = 1 << 19;
  const int32_t most = std::min(out(), std::max(1, kPanelElements / in()));
  Matrix2 panel(most, in());
  for (int32_t first = 0; first < out(); first += most) {
    panel.rows = std::min(most, out() - first);
    base_.ReadRows(id_, first, static_cast<int32_t>(panel.rows), panel.values.data());
    fn(first, panel);
  }
}

Matrix2 ModuleTensors::TimesWeight(const Matrix2& left) const {
  Matrix2 product(left.rows, in());
  ForPanels([&](int64_t first, const Matrix2& rows) {
    const Matrix2 factor = ColumnsOf(left, first, rows.rows);
    AddProduct(1, factor.values.data(), rows.values.data(), {left.rows, rows.rows, in()},
               product.values.data());
  });
  return product;
}

Matrix2 ModuleTensors::WeightTimes(const Matrix2& right) const {
  Matrix2 product(out(), right.columns);
  ForPanels([&](int64_t first, const Matrix2& rows) {
    AddProduct(1, rows.values.data(), right.values.data(), {rows.rows, in(), right.columns}, product.row(first));
  });
  return product;
}

Matrix2 ModuleTensors::WeightColumns(int64_t count) const {
  Matrix2 columns(out(), count);
  ForPanels([&](int64_t first, const Matrix2& rows) {
    for (int64_t r = 0; r < rows.rows; ++r) std::copy_n(rows.row(r), count, columns.row(first + r));
  });
  return columns;
}

absl::StatusOr<std::vector<float>> ModuleTensors::DoraScale(const Matrix2& a, const Matrix2& b,
                                                            const std::vector<float>& magnitude) const {
  std::vector<float> scale(out());
  LK_RETURN_IF_ERROR(DoraOutScale(base_, id_, a.values, b.values, static_cast<int32_t>(a.rows), 1, magnitude,
                                  scale.data()));
  return scale;
}

std::vector<float> ModuleTensors::Bias() const {
  std::vector<float> bias(out());
  if (!base_.ReadBias(id_, bias.data())) bias.clear();
  return bias;
}

}  // namespace lorikeet
