// What a handler of HTTP requests sees: a request, and the answer it makes, whole or piece by piece.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lorikeet {

class HttpAnswer;
using HttpBegin = std::function<std::unique_ptr<HttpAnswer>()>;

struct HttpRequest {
  std::string method;  // "GET"
  std::string path;    // up to the query, as it was sent
  std::string query;   // without the '?'
  std::string host;    // as the client sees the server
  std::string origin;  // of the web page that asks; empty: none does
  std::string authorization;
  std::string content_type;
  std::string request_id;   // the header x-request-id
  std::string traceparent;  // the header of that name
  std::string peer;              // its address
  std::vector<std::string> certificate_names;  // of a client certificate that was verified
  std::string body;
  // Of a request whose body is long: the answer that `begin` will have begun, on a thread where that may
  // take seconds. Empty where it takes no time.
  std::function<std::unique_ptr<HttpAnswer>(HttpBegin begin)> elsewhere = {};
};

struct HttpResponse {
  int status = 200;
  std::string body;
  std::string content_type = "application/json";
  std::string headers = {};  // further header lines, each ending in "\r\n"
};

// Takes an answer: either one Reply, or StartStream, any number of Writes and EndStream.
class HttpWriter {
 public:
  virtual ~HttpWriter() = default;

  virtual void Reply(HttpResponse response) = 0;
  // Status 200.
  virtual void StartStream(std::string_view content_type) = 0;
  // At most one in a Pump: the next Pump comes when these bytes have left.
  virtual void Write(std::string_view piece) = 0;
  virtual void EndStream() = 0;
};

// An answer under way; dropped once it is written, or when the client is gone.
class HttpAnswer {
 public:
  virtual ~HttpAnswer() = default;

  // Gives the writer what there is by now. Called first when the request was handled, then after
  // every wake and every piece that left, until the answer is whole. Never twice at a time.
  virtual void Pump(HttpWriter& writer) = 0;
};

// Begins an answer. `wake` may be called from any thread, at any time and more often than needed,
// to have Pump called; it does not block.
using HttpHandler =
    std::function<std::unique_ptr<HttpAnswer>(HttpRequest request, std::function<void()> wake)>;

// Looks at a request whose body has not been read yet. Not nullopt: that is the answer, and the body
// is not taken in.
using HttpGate = std::function<std::optional<HttpResponse>(const HttpRequest& head)>;

// An answer that is there at once.
class HttpReply final : public HttpAnswer {
 public:
  explicit HttpReply(HttpResponse response) : response_(std::move(response)) {}
  void Pump(HttpWriter& writer) override { writer.Reply(std::move(response_)); }

 private:
  HttpResponse response_;
};

}  // namespace lorikeet
