#include "server/openai/proto_json.h"

#include <google/protobuf/descriptor.h>

#include <limits>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "server/options.h"

namespace lorikeet {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

Json ScalarToJson(const Message& message, const FieldDescriptor* field) {
  const Reflection& fields = *message.GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      return fields.GetString(message, field);
    case FieldDescriptor::CPPTYPE_BOOL:
      return fields.GetBool(message, field);
    case FieldDescriptor::CPPTYPE_INT32:
      return fields.GetInt32(message, field);
    case FieldDescriptor::CPPTYPE_INT64:
      return fields.GetInt64(message, field);
    case FieldDescriptor::CPPTYPE_ENUM:
      return fields.GetEnum(message, field)->name();
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(fields.GetMessage(message, field));
    default:
      LK_CHECK_MSG(false, field->full_name());  // no such field in lorikeet.v1's adapters
      return {};
  }
}

Json RepeatedToJson(const Message& message, const FieldDescriptor* field) {
  const Reflection& fields = *message.GetReflection();
  Json items = Json::array();
  for (int i = 0; i < fields.FieldSize(message, field); ++i) {
    items.push_back(field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE
                        ? ToJson(fields.GetRepeatedMessage(message, field, i))
                        : Json(fields.GetRepeatedString(message, field, i)));
  }
  return items;
}

template <typename T>
T Read(Fields& json, const FieldDescriptor* field) {
  T value{};
  json.Read(field->name().c_str(), &value);
  return value;
}

void SetScalar(Fields& json, const FieldDescriptor* field, Message* message) {
  const Reflection& fields = *message->GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      return fields.SetString(message, field, Read<std::string>(json, field));
    case FieldDescriptor::CPPTYPE_BOOL:
      return fields.SetBool(message, field, Read<bool>(json, field));
    case FieldDescriptor::CPPTYPE_INT32:
      return fields.SetInt32(message, field, Read<int32_t>(json, field));
    case FieldDescriptor::CPPTYPE_INT64:
      return fields.SetInt64(message, field, Read<int64_t>(json, field));
    default:
      LK_CHECK_MSG(false, field->full_name());
  }
}

void SetRepeated(Fields& json, const FieldDescriptor* field, const Json& value, Message* message) {
  const Reflection& fields = *message->GetReflection();
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
    for (std::string& item : Read<std::vector<std::string>>(json, field)) {
      fields.AddString(message, field, std::move(item));
    }
    return;
  }
  const std::string name = json.prefix() + field->name();
  if (!value.is_array()) return json.Note(FieldError(name, "not an array"));
  for (size_t i = 0; i < value.size(); ++i) {
    json.Note(FromJson(value[i], fields.AddMessage(message, field),
                       absl::StrCat(name, "[", i, "].")));
  }
}

// A plain value of a query as what the field takes.
absl::StatusOr<Json> QueryValue(const FieldDescriptor& field, const std::string& text) {
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      if (text != "true" && text != "false") {
        return FieldError(field.name(), absl::StrCat("'", text, "' is not true or false"));
      }
      return Json(text == "true");
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64: {
      using Range = std::numeric_limits<int64_t>;
      LK_ASSIGN_OR_RETURN(const int64_t number,
                          ParseInt(text, Range::min(), Range::max(), field.name()));
      return Json(number);
    }
    default:
      return Json(text);
  }
}

}  // namespace

Json ToJson(const Message& message) {
  Json json = Json::object();
  const auto& type = *message.GetDescriptor();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor* field = type.field(i);
    if (field->is_repeated()) {
      json[field->name()] = RepeatedToJson(message, field);
    } else if (!field->has_presence() || message.GetReflection()->HasField(message, field)) {
      json[field->name()] = ScalarToJson(message, field);
    }
  }
  return json;
}

absl::Status FromJson(const Json& json, Message* message, const std::string& prefix) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(prefix, " is not an object"));
  }
  Fields fields(json, prefix);
  const auto& type = *message->GetDescriptor();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor* field = type.field(i);
    const Json* value = fields.Take(field->name().c_str());
    if (value == nullptr) continue;
    if (field->is_repeated()) {
      SetRepeated(fields, field, *value, message);
    } else {
      SetScalar(fields, field, message);
    }
  }
  return fields.Finish();
}

absl::Status FromQuery(std::string_view query, Message* message) {
  Json json = Json::object();
  for (const absl::string_view part :
       absl::StrSplit(absl::string_view(query.data(), query.size()), '&', absl::SkipEmpty())) {
    const std::vector<std::string> pair = absl::StrSplit(part, absl::MaxSplits('=', 1));
    LK_ASSIGN_OR_RETURN(const std::string name, DecodeUrl(pair[0]));
    LK_ASSIGN_OR_RETURN(const std::string text, DecodeUrl(pair.size() > 1 ? pair[1] : ""));
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name);
    if (field == nullptr) return FieldError(name, "this field is not supported");
    if (json.contains(name)) return FieldError(name, "given twice");
    LK_ASSIGN_OR_RETURN(json[name], QueryValue(*field, text));
  }
  return FromJson(json, message);
}

absl::StatusOr<std::string> DecodeUrl(std::string_view text) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      decoded += text[i];
      continue;
    }
    if (i + 2 >= text.size() || !absl::ascii_isxdigit(text[i + 1]) ||
        !absl::ascii_isxdigit(text[i + 2])) {
      return absl::InvalidArgumentError("a '%' in the URL is not followed by two digits");
    }
    decoded += absl::HexStringToBytes(std::string(text.substr(i + 1, 2)));
    i += 2;
  }
  return decoded;
}

}  // namespace lorikeet
