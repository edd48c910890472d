#include "tests/fuzz/requests.h"

#include <sys/socket.h>

#include <string>
#include <string_view>
#include <utility>

#include "engine/base/check.h"
#include "lorikeet/v1/adapters.pb.h"
#include "server/auth/keys_file.h"
#include "server/http/http_server.h"
#include "server/openai/proto_json.h"
#include "server/openai/request.h"
#include "server/openai/tools.h"
#include "tests/e2e/http_client.h"

namespace lorikeet::testing {
namespace {

std::string_view Text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void CheckRefusal(const absl::Status& status) {
  LK_CHECK_MSG(status.ok() || absl::IsInvalidArgument(status), status.ToString());
  LK_CHECK_MSG(status.ok() || !status.message().empty(), "no message");
}

template <typename Message>
void ReadMessage(const Json& body) {
  Message message;
  const absl::Status status = FromJson(body, &message);
  CheckRefusal(status);
  if (!status.ok()) return;
  Message again;
  CheckRefusal(FromJson(ToJson(message), &again));
}

ToolCallFinder::Found FindAll(const ToolOptions& options, std::string_view text, size_t piece) {
  ToolCallFinder finder(&options);
  ToolCallFinder::Found all;
  const auto add = [&all](ToolCallFinder::Found found) {
    all.text += found.text;
    for (ToolCall& call : found.calls) all.calls.push_back(std::move(call));
  };
  for (size_t at = 0; at < text.size(); at += piece) add(finder.Append(text.substr(at, piece)));
  add(finder.Finish());
  LK_CHECK(finder.calls() == static_cast<int>(all.calls.size()));
  return all;
}

// One for all inputs: its port must go on.
HttpServer& Server() {
  static HttpServer* server = [] {
    HttpOptions options{.host = "127.0.0.1"};
    options.limits.header_bytes = 2 << 10;
    options.limits.body_bytes = 4 << 10;
    auto started = HttpServer::Start(options, [](HttpRequest request, auto) {
      return std::make_unique<HttpReply>(HttpResponse{.body = std::move(request.body)});
    });
    LK_CHECK_MSG(started.ok(), started.status().ToString());
    return started->release();
  }();
  return *server;
}

}  // namespace

void FuzzRequestBody(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const absl::StatusOr<Json> body = ParseBody(std::string(Text(bytes.subspan(1))));
  if (!body.ok()) return CheckRefusal(body.status());
  switch (std::to_integer<int>(bytes[0]) % 7) {
    case 0:
      return CheckRefusal(ParseCompletion(*body).status());
    case 1:
      return CheckRefusal(ParseChat(*body, ToolStyle::kTagged).status());
    case 2:
      return CheckRefusal(ParseChat(*body, ToolStyle::kNone).status());
    case 3:
      return CheckRefusal(ParseEmbedding(*body, 64).status());
    case 4:
      return ReadMessage<v1::LoadAdapterRequest>(*body);
    case 5:
      return ReadMessage<v1::SetAliasRequest>(*body);
    default:
      return ReadMessage<v1::PlanCapacityRequest>(*body);
  }
}

void FuzzQuery(std::span<const std::byte> bytes) {
  v1::ListAdaptersRequest request;
  CheckRefusal(FromQuery(Text(bytes), &request));
}

void FuzzKeys(std::span<const std::byte> bytes) {
  const auto keys = ParseKeys(std::string(Text(bytes)));
  if (!keys.ok()) return CheckRefusal(keys.status());
  std::string written;
  size_t with_hash = 0;
  for (const KeyEntry& key : *keys) {
    if (key.sha256.empty()) continue;
    written += FormatKey(key);
    ++with_hash;
  }
  const auto again = ParseKeys(written);
  LK_CHECK_MSG(again.ok(), again.status().ToString());
  LK_CHECK(again->size() == with_hash);
}

void FuzzToolCalls(std::span<const std::byte> bytes) {
  ToolOptions options{.names = {"weather", "clock"}};
  for (const ToolStyle style : {ToolStyle::kTagged, ToolStyle::kWhole}) {
    options.style = style;
    const ToolCallFinder::Found whole = FindAll(options, Text(bytes), bytes.size() + 1);
    for (const size_t piece : {1, 7}) {
      const ToolCallFinder::Found pieces = FindAll(options, Text(bytes), piece);
      LK_CHECK_MSG(whole.text == pieces.text, pieces.text);
      LK_CHECK(whole.calls.size() == pieces.calls.size());
    }
    if (whole.calls.empty()) LK_CHECK_MSG(whole.text == Text(bytes), whole.text);
  }
}

void FuzzHttp(std::span<const std::byte> bytes) {
  HttpClient client(Server().port());
  client.Send(std::string(Text(bytes)));
  shutdown(client.fd(), SHUT_WR);
  const std::string answers = client.Rest();
  LK_CHECK_MSG(answers.empty() || answers.starts_with("HTTP/1.1 "), answers);
  HttpClient next(Server().port());
  LK_CHECK(next.Get("/").status == 200);
}

}  // namespace lorikeet::testing
