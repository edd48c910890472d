#include "server/http/errors.h"

#include "nlohmann/json.hpp"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;

const char* TypeOf(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    default:
      return status < 500 ? "invalid_request_error" : "server_error";
  }
}

const char* CodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnauthenticated:
      return "invalid_api_key";
    case absl::StatusCode::kNotFound:
      return "model_not_found";
    case absl::StatusCode::kResourceExhausted:
      return "rate_limit_exceeded";
    default:
      return nullptr;
  }
}

Json ParamOf(const std::string& message) {
  const size_t end = message.find_first_not_of(
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.[]");
  if (end == 0 || end == std::string::npos) return nullptr;
  const std::string rest = message.substr(end, 4);
  if (rest.rfind(": ", 0) != 0 && rest != " is ") return nullptr;
  return message.substr(0, end);
}

std::string Body(int http_status, const std::string& message, const char* code) {
  const Json param = http_status == 400 ? ParamOf(message) : Json(nullptr);
  const Json error = {{"error",
                       {{"message", message},
                        {"type", TypeOf(http_status)},
                        {"param", param},
                        {"code", code == nullptr ? Json(nullptr) : Json(code)}}}};
  return error.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

int HttpStatusOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kDataLoss:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kAlreadyExists:
      return 409;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

std::string ErrorBody(const absl::Status& status) {
  return Body(HttpStatusOf(status), std::string(status.message()), CodeOf(status));
}

HttpResponse ErrorResponse(int http_status, const std::string& message) {
  return {.status = http_status, .body = Body(http_status, message, nullptr)};
}

HttpResponse ErrorResponse(const absl::Status& status) {
  HttpResponse response{.status = HttpStatusOf(status), .body = ErrorBody(status)};
  if (response.status == 401) response.headers = "WWW-Authenticate: Bearer\r\n";
  if (response.status == 429) response.headers = "Retry-After: 1\r\n";
  return response;
}

}  // namespace lorikeet
