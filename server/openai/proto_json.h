// Messages of lorikeet.v1 as JSON objects: fields by their own names, numbers as numbers, kinds of
// an enum by their names.
#pragma once

#include <google/protobuf/message.h>

#include <string_view>

#include "absl/status/status.h"
#include "server/openai/fields.h"

namespace lorikeet {

// Every field, set or not, but for unset optional ones.
Json ToJson(const google::protobuf::Message& message);

// Sets what `json` has. INVALID_ARGUMENT names a field that the message does not have or whose
// value is of another type; `prefix` goes before the names ("targets[0].").
absl::Status FromJson(const Json& json, google::protobuf::Message* message,
                      const std::string& prefix = {});

// The same of a URL's query, "page_size=10&in_host_only=true": plain fields alone.
absl::Status FromQuery(std::string_view query, google::protobuf::Message* message);

// Of a URL's part. INVALID_ARGUMENT: '%' without two hexadecimal digits behind it.
absl::StatusOr<std::string> DecodeUrl(std::string_view text);

}  // namespace lorikeet
