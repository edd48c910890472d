#include "server/openai/fields.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/json.h"

namespace lorikeet {
namespace {

constexpr size_t kShownBytes = 80;

std::string Shown(const Json& value) {
  std::string text = Dump(value);
  if (text.size() > kShownBytes) text = value.type_name();
  return text;
}

}  // namespace

absl::Status FieldError(const std::string& field, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", what));
}

absl::StatusOr<Json> ParseBody(const std::string& body) {
  LK_ASSIGN_OR_RETURN(Json json, ParseOrderedJson(body));
  if (!json.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request's body is ", json.type_name(), ", not an object"));
  }
  return json;
}

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

const Json* Fields::Take(const char* name) {
  seen_.insert(name);
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void Fields::Accept(const char* name, const Json& value) {
  const Json* given = Take(name);
  if (given == nullptr || *given == value) return;
  Note(FieldError(prefix_ + name,
                  absl::StrCat(Shown(*given), " is not supported; only ", Dump(value))));
}

absl::Status Fields::Finish() const {
  if (!error_.ok()) return error_;
  for (const auto& [name, value] : object_.items()) {
    if (!seen_.contains(name) && !value.is_null()) {
      return FieldError(prefix_ + name, "this field is not supported");
    }
  }
  return absl::OkStatus();
}

absl::Status Fields::WrongType(const std::string& field, const Json& value, const char* wanted) {
  return FieldError(field, absl::StrCat(Shown(value), " is not ", wanted));
}

absl::Status Fields::TooMany(const std::string& field, size_t size) {
  return FieldError(field, absl::StrCat(size, " items; at most ", kMaxItems));
}

absl::Status Fields::Convert(const Json& value, const std::string& field, bool* out) {
  if (!value.is_boolean()) return WrongType(field, value, "true or false");
  *out = value.get<bool>();
  return absl::OkStatus();
}

absl::Status Fields::Convert(const Json& value, const std::string& field, int64_t* out) {
  constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (!value.is_number_integer()) return WrongType(field, value, "a whole number");
  if (value.is_number_unsigned() && value.get<uint64_t>() > kMost) {
    return FieldError(field, absl::StrCat(Shown(value), " is larger than ", kMost));
  }
  *out = value.get<int64_t>();
  return absl::OkStatus();
}

absl::Status Fields::Convert(const Json& value, const std::string& field, int32_t* out) {
  int64_t wide = 0;
  LK_RETURN_IF_ERROR(Convert(value, field, &wide));
  using Range = std::numeric_limits<int32_t>;
  if (wide < Range::min() || wide > Range::max()) {
    return FieldError(
        field, absl::StrCat(wide, " is not in [", Range::min(), ", ", Range::max(), "]"));
  }
  *out = static_cast<int32_t>(wide);
  return absl::OkStatus();
}

absl::Status Fields::Convert(const Json& value, const std::string& field, float* out) {
  if (!value.is_number()) return WrongType(field, value, "a number");
  *out = value.get<float>();
  return absl::OkStatus();
}

absl::Status Fields::Convert(const Json& value, const std::string& field, std::string* out) {
  if (!value.is_string()) return WrongType(field, value, "a string");
  *out = value.get<std::string>();
  return absl::OkStatus();
}

}  // namespace lorikeet
