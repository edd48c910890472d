#include "server/http/http_server.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/file_watch.h"
#include "server/http/begun_elsewhere.h"
#include "server/http/tls.h"
#include "server/listen.h"
#include "server/log.h"

namespace lorikeet {
namespace {

namespace asio = boost::asio;
using ErrorCode = boost::system::error_code;
using tcp = asio::ip::tcp;

constexpr size_t kLongBodyBytes = 64 << 10;  // take some milliseconds to read
constexpr int kLongBodyThreads = 2;
constexpr auto kSweepEvery = std::chrono::seconds(1);
constexpr auto kAcceptPause = std::chrono::milliseconds(50);

}  // namespace

struct HttpServer::Impl {
  Impl(const HttpOptions& options, HttpHandler handler, HttpGate gate)
      : io(options.threads), strand(asio::make_strand(io)), acceptor(strand), sweep(strand) {
    shared->handler = [this, handler = std::move(handler)](HttpRequest request, auto wake) {
      if (request.body.size() < kLongBodyBytes) return handler(std::move(request), std::move(wake));
      const auto elsewhere = [this, wake](HttpBegin begin) -> std::unique_ptr<HttpAnswer> {
        return std::make_unique<BegunElsewhere>(&long_bodies, std::move(begin), wake);
      };
      request.elsewhere = elsewhere;
      return elsewhere([&handler, wake, whole = std::make_shared<HttpRequest>(std::move(request))] {
        return handler(std::move(*whole), wake);
      });
    };
    shared->gate = std::move(gate);
    shared->limits = options.limits;
  }
  ~Impl() {
    tls_watch.reset();
    shared->stopping = true;
    asio::post(strand, [this] { Stop(); });
    for (std::thread& thread : threads) thread.join();
    long_bodies.join();
    shared->wakes.Close();
  }

  // Everything ends by itself once the sockets are closed, so no handler is left behind.
  void Stop() {
    ErrorCode ignored;
    acceptor.close(ignored);
    sweep.cancel(ignored);
    for (const auto& weak : connections) {
      if (const auto connection = weak.lock()) connection->Close();
    }
  }

  void Accept() {
    acceptor.async_accept(asio::make_strand(io), [this](ErrorCode error, tcp::socket socket) {
      if (shared->stopping || error == asio::error::operation_aborted) return;
      if (error) return PauseAccepting();  // out of file descriptors, most likely
      Admit(std::move(socket));
      Accept();
    });
  }

  void PauseAccepting() {
    auto timer = std::make_shared<asio::steady_timer>(strand, kAcceptPause);
    timer->async_wait([this, timer](ErrorCode) {
      if (!shared->stopping) Accept();
    });
  }

  // A connection over the limit is closed at once.
  void Admit(tcp::socket socket) {
    if (connections.size() >= static_cast<size_t>(shared->limits.connections)) ForgetClosed();
    if (connections.size() >= static_cast<size_t>(shared->limits.connections)) return;
    const auto connection = tls == nullptr ? MakeConnection(std::move(socket), shared)
                                           : MakeTlsConnection(std::move(socket), tls, shared);
    connections.push_back(connection);
    connection->Start();
  }

  // Any thread. Files that are wrong leave the certificates from before.
  void ReloadTls(const TlsFiles& files) {
    auto fresh = LoadTls(files);
    if (!fresh.ok()) {
      return Log(LogLevel::kWarning, absl::StrCat(fresh.status().message(), "; the certificates from before stay"));
    }
    Log(LogLevel::kInfo, absl::StrCat("certificates read again from ", files.certificate));
    asio::post(strand, [this, fresh = *std::move(fresh)] { tls = fresh; });
  }

  void ForgetClosed() {
    std::erase_if(connections, [](const auto& weak) { return weak.expired(); });
  }

  void Sweep() {
    sweep.expires_after(kSweepEvery);
    sweep.async_wait([this](ErrorCode error) {
      if (error || shared->stopping) return;
      ForgetClosed();
      const int64_t now_s = SteadySeconds();
      for (const auto& weak : connections) {
        if (const auto connection = weak.lock()) connection->CloseIfLate(now_s);
      }
      Sweep();
    });
  }

  asio::io_context io;
  const std::shared_ptr<HttpShared> shared = std::make_shared<HttpShared>(&io);
  asio::strand<asio::io_context::executor_type> strand;  // tls, acceptor, sweep and the list
  std::shared_ptr<asio::ssl::context> tls;  // nullptr: plain
  tcp::acceptor acceptor;
  asio::steady_timer sweep;
  std::vector<std::weak_ptr<HttpConnection>> connections;
  std::vector<std::thread> threads;
  asio::thread_pool long_bodies{kLongBodyThreads};
  std::unique_ptr<FileWatch> tls_watch;  // null: plain
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;
int HttpServer::port() const { return impl_->acceptor.local_endpoint().port(); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpOptions& options,
                                                              HttpHandler handler,
                                                              HttpGate gate) {
  LK_RETURN_IF_ERROR(CheckCanListen(options.host, options.port, "HTTP port"));
  auto impl = std::make_unique<Impl>(options, std::move(handler), std::move(gate));
  if (options.tls.on()) {
    LK_ASSIGN_OR_RETURN(impl->tls, LoadTls(options.tls));
    impl->tls_watch = std::make_unique<FileWatch>(
        options.tls.paths(),
        [impl = impl.get(), files = options.tls] { impl->ReloadTls(files); });
  }
  try {
    const tcp::endpoint endpoint = *tcp::resolver(impl->io).resolve(
        options.host, std::to_string(options.port), tcp::resolver::passive);
    impl->acceptor.open(endpoint.protocol());
    impl->acceptor.set_option(asio::socket_base::reuse_address(true));
    impl->acceptor.bind(endpoint);
    impl->acceptor.listen();
  } catch (const boost::system::system_error& error) {
    return absl::UnavailableError(absl::StrCat("HTTP port ", HostPort(options.host, options.port),
                                               ": ", error.code().message()));
  }
  impl->Accept();
  impl->Sweep();
  for (int i = 0; i < options.threads; ++i) {
    impl->threads.emplace_back([io = &impl->io] { io->run(); });
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

}  // namespace lorikeet
