// Reads the members of a JSON object that a client sent, and finds out what nobody read: a field
// that would be ignored is an error that names it.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

using Json = nlohmann::ordered_json;

// Each Read leaves `out` as it is where the member is absent or null, and notes the first value
// that has the wrong type or does not fit.
class Fields {
 public:
  // `object` outlives this; `prefix` goes before the names in messages ("stream_options.").
  explicit Fields(const Json& object, std::string prefix = {})
      : object_(object), prefix_(std::move(prefix)) {}

  template <typename T>
  void Read(const char* name, T* out) {
    if (const Json* value = Take(name)) Note(Convert(*value, prefix_ + name, out));
  }
  template <typename T>
  void Read(const char* name, std::optional<T>* out) {
    if (const Json* value = Take(name)) Note(Convert(*value, prefix_ + name, &out->emplace()));
  }
  // The member as it is; nullptr: absent or null.
  const Json* Take(const char* name);
  // A member that may be there with this value alone, which asks for nothing.
  void Accept(const char* name, const Json& value);

  void Note(const absl::Status& status) { error_.Update(status); }
  bool ok() const { return error_.ok(); }
  const std::string& prefix() const { return prefix_; }

  // The first error; else the first member that nothing read.
  absl::Status Finish() const;

  // A value as a T; `field`: its name in messages.
  static absl::Status Convert(const Json& value, const std::string& field, bool* out);
  static absl::Status Convert(const Json& value, const std::string& field, int32_t* out);
  static absl::Status Convert(const Json& value, const std::string& field, int64_t* out);
  static absl::Status Convert(const Json& value, const std::string& field, float* out);
  static absl::Status Convert(const Json& value, const std::string& field, std::string* out);
  template <typename T>
  static absl::Status Convert(const Json& value, const std::string& field, std::vector<T>* out) {
    if (!value.is_array()) return WrongType(field, value, "an array");
    for (size_t i = 0; i < value.size() && i < kMaxItems; ++i) {
      const absl::Status status =
          Convert(value[i], field + "[" + std::to_string(i) + "]", &out->emplace_back());
      if (!status.ok()) return status;
    }
    return value.size() <= kMaxItems ? absl::OkStatus() : TooMany(field, value.size());
  }

 private:
  static constexpr size_t kMaxItems = 1 << 22;
  static absl::Status WrongType(const std::string& field, const Json& value, const char* wanted);
  static absl::Status TooMany(const std::string& field, size_t size);

  const Json& object_;
  const std::string prefix_;
  std::set<std::string> seen_;
  absl::Status error_;
};

// "field: what is wrong".
absl::Status FieldError(const std::string& field, const std::string& what);

// A request's body. INVALID_ARGUMENT: not JSON, or no object.
absl::StatusOr<Json> ParseBody(const std::string& body);

// As text, with U+FFFD for what is not UTF-8.
std::string Dump(const Json& json);

}  // namespace lorikeet
