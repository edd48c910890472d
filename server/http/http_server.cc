#include "server/http/http_server.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/listen.h"

namespace lorikeet {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using tcp = asio::ip::tcp;
using Request = http::request<http::string_body>;
using Response = http::response<http::string_body>;

constexpr uint32_t kMaxHeaderBytes = 16 << 10;
constexpr uint64_t kMaxBodyBytes = 64 << 10;
constexpr auto kIdleLimit = std::chrono::seconds(60);

Response Reply(const Request& request, http::status status, std::string body,
               const char* type = "text/plain; charset=utf-8") {
  Response response(status, request.version());
  response.set(http::field::content_type, type);
  response.keep_alive(request.keep_alive());
  response.body() = std::move(body);
  response.prepare_payload();
  return response;
}

Response Route(const Request& request, const HttpServer::Handlers& handlers) {
  const auto target = request.target().substr(0, request.target().find('?'));
  const bool known = target == "/health" || target == "/ready" || target == "/metrics";
  if (!known) return Reply(request, http::status::not_found, "no such path\n");
  if (request.method() != http::verb::get && request.method() != http::verb::head) {
    Response response = Reply(request, http::status::method_not_allowed, "only GET\n");
    response.set(http::field::allow, "GET, HEAD");
    return response;
  }
  if (target == "/health") {
    const absl::Status health = handlers.health();
    if (health.ok()) return Reply(request, http::status::ok, "ok\n");
    return Reply(request, http::status::service_unavailable, absl::StrCat(health.message(), "\n"));
  }
  if (target == "/metrics") {
    return Reply(request, http::status::ok, handlers.metrics(), "text/plain; version=0.0.4");
  }
  if (handlers.ready()) return Reply(request, http::status::ok, "ready\n");
  return Reply(request, http::status::service_unavailable, "not ready\n");
}

// One connection: reads a request, answers it, reads the next. Keeps itself alive through its
// pending operation.
class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(tcp::socket socket, const HttpServer::Handlers& handlers)
      : stream_(std::move(socket)), handlers_(handlers) {}

  void Read() {
    parser_.emplace();
    parser_->header_limit(kMaxHeaderBytes);
    parser_->body_limit(kMaxBodyBytes);
    stream_.expires_after(kIdleLimit);
    http::async_read(stream_, buffer_, *parser_,
                     [self = shared_from_this()](beast::error_code error, size_t) {
                       if (!error) self->Answer();
                     });
  }

 private:
  void Answer() {
    const Request& request = parser_->get();
    response_ = Route(request, handlers_);
    if (request.method() == http::verb::head) response_.body().clear();  // the length stays
    http::async_write(stream_, response_,
                      [self = shared_from_this()](beast::error_code error, size_t) {
                        if (!error && self->response_.keep_alive()) return self->Read();
                        self->stream_.socket().shutdown(tcp::socket::shutdown_send, error);
                      });
  }

  beast::tcp_stream stream_;
  const HttpServer::Handlers& handlers_;
  beast::flat_buffer buffer_;
  boost::optional<http::request_parser<http::string_body>> parser_;
  Response response_;
};

}  // namespace

struct HttpServer::Impl {
  explicit Impl(Handlers from) : handlers(std::move(from)), acceptor(io) {}
  ~Impl() {
    io.stop();
    if (thread.joinable()) thread.join();
  }

  void Accept() {
    acceptor.async_accept([this](beast::error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted) return;
      if (!error) std::make_shared<Session>(std::move(socket), handlers)->Read();
      Accept();
    });
  }

  const Handlers handlers;
  asio::io_context io{1};
  tcp::acceptor acceptor;
  std::thread thread;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;
int HttpServer::port() const { return impl_->acceptor.local_endpoint().port(); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& host, int32_t port,
                                                              Handlers handlers) {
  LK_RETURN_IF_ERROR(CheckCanListen(host, port, "HTTP port"));
  auto impl = std::make_unique<Impl>(std::move(handlers));
  try {
    const tcp::endpoint endpoint =
        *tcp::resolver(impl->io).resolve(host, std::to_string(port), tcp::resolver::passive);
    impl->acceptor.open(endpoint.protocol());
    impl->acceptor.set_option(asio::socket_base::reuse_address(true));
    impl->acceptor.bind(endpoint);
    impl->acceptor.listen();
  } catch (const boost::system::system_error& error) {
    return absl::UnavailableError(
        absl::StrCat("HTTP port ", HostPort(host, port), ": ", error.code().message()));
  }
  impl->Accept();
  impl->thread = std::thread([io = &impl->io] { io->run(); });
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

}  // namespace lorikeet
