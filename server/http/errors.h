// Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "server/http/message.h"

namespace lorikeet {

// 400 for INVALID_ARGUMENT, 404 for NOT_FOUND, 429 for RESOURCE_EXHAUSTED, ...
int HttpStatusOf(const absl::Status& status);

// The object as text; `param` is the field that the message begins with, as in "top_p is 2; ..." or
// "stop[3]: ...", null if it begins with none.
std::string ErrorBody(const absl::Status& status);

HttpResponse ErrorResponse(int http_status, const std::string& message);
HttpResponse ErrorResponse(const absl::Status& status);

}  // namespace lorikeet
