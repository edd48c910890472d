#include "server/http/connection.h"

#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "server/http/errors.h"
#include "server/http/tls.h"

namespace lorikeet {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using ErrorCode = boost::system::error_code;

constexpr size_t kReadBytes = 8 << 10;
constexpr size_t kMaxAheadBytes = 64 << 10;  // of requests behind the one being answered
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int64_t kLingerSeconds = 5;

std::string ToString(beast::string_view text) { return {text.data(), text.size()}; }

// A target may name its server, as to a proxy; that one then counts, not the header's.
void TakeServer(std::string* target, std::string* host) {
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (!absl::StartsWithIgnoreCase(*target, absl::string_view(scheme.data(), scheme.size()))) continue;
    const size_t end = std::min(target->find_first_of("/?", scheme.size()), target->size());
    *host = target->substr(scheme.size(), end - scheme.size());
    target->erase(0, end);
    if (!target->starts_with('/')) target->insert(0, "/");
    return;
  }
}

// Finds out within a minute or two that a silent client's machine is gone.
void ProbeSilence(TcpSocket* socket) {
  ErrorCode ignored;
  socket->set_option(asio::socket_base::keep_alive(true), ignored);
  socket->set_option(asio::ip::tcp::no_delay(true), ignored);
  const int fd = socket->native_handle();
  const auto set = [fd](int option, int value) {
    setsockopt(fd, IPPROTO_TCP, option, &value, sizeof value);
  };
  set(TCP_KEEPIDLE, 30);
  set(TCP_KEEPINTVL, 10);
  set(TCP_KEEPCNT, 3);
  set(TCP_USER_TIMEOUT, 60'000);
}

template <typename Stream>
class Connection final : public HttpConnection,
                         public HttpWriter,
                         public std::enable_shared_from_this<Connection<Stream>> {
 public:
  template <typename... Args>
  Connection(std::shared_ptr<HttpShared> shared, Args&&... args)
      : shared_(std::move(shared)), stream_(std::forward<Args>(args)...) {}
  ~Connection() override { ReleaseBody(); }

  void Start() override {
    ErrorCode error;
    const auto peer = socket().remote_endpoint(error);
    if (!error) peer_ = peer.address().to_string();
    ProbeSilence(&socket());
    asio::post(stream_.get_executor(), [self = this->shared_from_this()] { self->Begin(); });
  }

  void CloseIfLate(int64_t now_s) override {
    if (now_s < deadline_s_) return;
    Close();
  }

  void Close() override {
    asio::post(stream_.get_executor(), [self = this->shared_from_this()] { self->Abandon(); });
  }

  void OnWake() override {
    asio::dispatch(stream_.get_executor(), [self = this->shared_from_this()] {
      self->woken_ = false;
      self->Pump();
    });
  }

  void Reply(HttpResponse response) override {
    LK_CHECK(answer_ != nullptr && !streaming_);
    const bool length_only = head_;
    out_ += absl::StrCat("HTTP/1.1 ", response.status, " ",
                         ToString(http::obsolete_reason(http::int_to_status(response.status))),
                         "\r\nContent-Type: ", response.content_type, "\r\n", response.headers,
                         "Content-Length: ", response.body.size(), "\r\n", ConnectionLine(),
                         "\r\n");
    if (!length_only) out_ += response.body;
    answered_ = true;
  }

  void StartStream(std::string_view content_type) override {
    LK_CHECK(answer_ != nullptr && !streaming_);
    streaming_ = true;
    chunked_ = version_ >= 11;
    if (!chunked_) keep_alive_ = false;
    absl::StrAppend(&out_, "HTTP/1.1 200 OK\r\nContent-Type: ",
                    absl::string_view(content_type.data(), content_type.size()),
                    "\r\nCache-Control: no-cache\r\n",
                    chunked_ ? "Transfer-Encoding: chunked\r\n" : "", ConnectionLine(), "\r\n");
  }

  void Write(std::string_view piece) override {
    LK_CHECK(streaming_);
    if (piece.empty() || head_) return;
    if (chunked_) absl::StrAppend(&out_, absl::Hex(piece.size()), "\r\n");
    out_.append(piece);
    if (chunked_) out_ += "\r\n";
  }

  void EndStream() override {
    LK_CHECK(streaming_);
    if (chunked_ && !head_) out_ += "0\r\n\r\n";
    answered_ = true;
  }

 private:
  using Parser = http::request_parser<http::string_body>;
  using Self = std::shared_ptr<Connection>;

  TcpSocket& socket() {
    if constexpr (std::is_same_v<Stream, TlsStream>) {
      return stream_.next_layer();
    } else {
      return stream_;
    }
  }

  std::string ConnectionLine() const {
    return keep_alive_ ? "Connection: keep-alive\r\n" : "Connection: close\r\n";
  }

  void Begin() {
    ErrorCode ignored;
    socket().non_blocking(true, ignored);
    if constexpr (std::is_same_v<Stream, TlsStream>) {
      SetDeadline(shared_->limits.handshake_s);
      stream_.async_handshake(asio::ssl::stream_base::server,
                              [self = this->shared_from_this()](ErrorCode error) {
                                if (error) return self->Abandon();
                                self->certificate_names_ = PeerNames(self->stream_.native_handle());
                                self->NextRequest();
                              });
    } else {
      NextRequest();
    }
  }

  void SetDeadline(int32_t seconds) { deadline_s_ = SteadySeconds() + seconds; }

  // ---- reading

  void NextRequest() {
    parser_.emplace();
    parser_->eager(true);
    parser_->header_limit(shared_->limits.header_bytes);
    parser_->body_limit(shared_->limits.body_bytes);
    continued_ = gated_ = false;
    SetDeadline(shared_->limits.read_s);
    Parse();
  }

  void Read() {
    if (reading_ || closed_) return;
    reading_ = true;
    stream_.async_read_some(asio::buffer(chunk_),
                            [self = this->shared_from_this()](ErrorCode error, size_t bytes) {
                              self->reading_ = false;
                              self->OnRead(error, bytes);
                            });
  }

  void OnRead(ErrorCode error, size_t bytes) {
    if (error || closed_) return Abandon();  // closed: this read was done before
    if (lingering_) {
      discarded_ += bytes;
      if (discarded_ > shared_->limits.body_bytes) return Abandon();
      return Read();
    }
    buffer_.append(chunk_.data(), bytes);
    if (answer_ == nullptr) return Parse();
    if (buffer_.size() < kMaxAheadBytes) Read();
  }

  // Takes what the buffer has; a whole request is handed on.
  void Parse() {
    while (!buffer_.empty()) {
      ErrorCode error;
      const size_t used = parser_->put(asio::buffer(buffer_), error);
      buffer_.erase(0, used);
      if (error == http::error::need_more) break;
      if (error) return Refuse(RefusalOf(error));
      if (parser_->is_done()) break;
      if (used == 0) break;
    }
    // Left for more to come: lines that Beast takes whole or not at all, and does not bound where
    // they are of chunks.
    if (buffer_.size() > shared_->limits.header_bytes && !parser_->is_done()) {
      return Refuse(RefusalOf(http::error::header_limit));
    }
    if (parser_->is_header_done() && !CheckHead()) return;
    if (parser_->is_header_done() && !parser_->is_done() && !PassGate()) return;
    if (parser_->is_header_done() && !ClaimBody()) return;
    if (parser_->is_done()) return Dispatch();
    if (parser_->is_header_done()) Continue();
    Read();
  }

  HttpResponse RefusalOf(ErrorCode error) const {
    if (error == http::error::body_limit) {
      return ErrorResponse(413, absl::StrCat("the request's body is larger than ",
                                             shared_->limits.body_bytes, " bytes"));
    }
    if (error == http::error::header_limit) {
      return ErrorResponse(431, absl::StrCat("the request's headers are larger than ",
                                             shared_->limits.header_bytes, " bytes"));
    }
    return ErrorResponse(400, absl::StrCat("not an HTTP request: ", error.message()));
  }

  // What a proxy in front may have read in another way than we would.
  bool CheckHead() {
    const Parser::value_type& head = parser_->get();
    const beast::string_view coding = head[http::field::transfer_encoding];
    if (!coding.empty() && !beast::iequals(coding, "chunked")) {
      Refuse(ErrorResponse(501, absl::StrCat("Transfer-Encoding: '", ToString(coding),
                                             "' is not supported; only 'chunked'")));
      return false;
    }
    if (head.version() < 11 || head.count(http::field::host) == 1) return true;
    Refuse(ErrorResponse(400, absl::StrCat("Host: ", head.count(http::field::host),
                                           " of them; exactly one")));
    return false;
  }

  bool PassGate() {
    if (std::exchange(gated_, true) || shared_->gate == nullptr) return true;
    std::optional<HttpResponse> refusal = shared_->gate(HeadOf(parser_->get()));
    if (!refusal) return true;
    Refuse(*std::move(refusal));
    return false;
  }

  // Counts the body among those that all connections read. A body without a length can become as
  // large as the limit.
  bool ClaimBody() {
    if (claimed_ > 0) return true;
    const auto length = parser_->content_length();
    int64_t bytes = 0;
    if (length) {
      bytes = static_cast<int64_t>(*length);
    } else if (parser_->chunked()) {
      bytes = static_cast<int64_t>(shared_->limits.body_bytes);
    }
    if (bytes == 0) return true;
    claimed_ = bytes;
    if (shared_->bodies_bytes.fetch_add(bytes) + bytes <= shared_->limits.bodies_bytes) return true;
    Refuse(ErrorResponse(503, absl::StrCat("the requests being read take ",
                                           shared_->limits.bodies_bytes,
                                           " bytes already; try again later")));
    return false;
  }

  void ReleaseBody() { shared_->bodies_bytes -= std::exchange(claimed_, 0); }

  void Continue() {
    if (std::exchange(continued_, true) || writing_) return;
    if (!beast::iequals(parser_->get()[http::field::expect], "100-continue")) return;
    out_ = "HTTP/1.1 100 Continue\r\n\r\n";
    Flush();
  }

  // ---- answering

  HttpRequest HeadOf(const Parser::value_type& message) const {
    HttpRequest request;
    request.method = ToString(message.method_string());
    std::string target = ToString(message.target());
    request.host = ToString(message[http::field::host]);
    TakeServer(&target, &request.host);
    const size_t question = target.find('?');
    request.path = target.substr(0, question);
    if (question != std::string::npos) request.query = target.substr(question + 1);
    request.origin = ToString(message[http::field::origin]);
    request.authorization = ToString(message[http::field::authorization]);
    request.content_type = ToString(message[http::field::content_type]);
    request.request_id = ToString(message["x-request-id"]);
    request.traceparent = ToString(message["traceparent"]);
    request.peer = peer_;
    request.certificate_names = certificate_names_;
    return request;
  }

  void Dispatch() {
    auto message = parser_->release();
    keep_alive_ = message.keep_alive() && !shared_->stopping;
    head_ = message.method() == http::verb::head;
    version_ = message.version();
    HttpRequest request = HeadOf(message);
    request.body = std::move(message.body());
    deadline_s_ = kNever;
    answering_ = this->shared_from_this();
    answer_ = shared_->handler(std::move(request), [weak = this->weak_from_this()] {
      if (Self self = weak.lock()) self->Wake(self);
    });
    Read();
    Pump();
  }

  void Refuse(HttpResponse response) {
    keep_alive_ = false;
    answer_ = std::make_unique<HttpReply>(std::move(response));
    Pump();
  }

  void Wake(Self self) {
    if (!woken_.exchange(true)) shared_->wakes.Push(std::move(self));
  }

  void Pump() {
    while (answer_ != nullptr && !writing_ && !answered_ && !closed_) {
      answer_->Pump(*this);
      if (out_.empty()) return;
      // The last piece is left to Flush: what follows it may be the next of many requests, which
      // must not nest.
      if (answered_ || !SendNow()) return Flush();
    }
  }

  // Whether all that is to be written left at once. An error is left to Flush as well.
  bool SendNow() {
    if constexpr (std::is_same_v<Stream, TlsStream>) return false;
    ErrorCode error;
    out_.erase(0, socket().write_some(asio::buffer(out_), error));
    return out_.empty();
  }

  void Flush() {
    writing_ = true;
    SetDeadline(shared_->limits.write_s);
    asio::async_write(stream_, asio::buffer(out_),
                      [self = this->shared_from_this()](ErrorCode error, size_t) {
                        self->writing_ = false;
                        self->OnWritten(error);
                      });
  }

  void OnWritten(ErrorCode error) {
    if (error || closed_) return Abandon();
    out_.clear();
    if (answer_ == nullptr) return SetDeadline(shared_->limits.read_s);  // 100 Continue
    deadline_s_ = kNever;
    if (!answered_) return Pump();
    FinishAnswer();
  }

  void FinishAnswer() {
    answer_.reset();
    answering_.reset();
    answered_ = streaming_ = false;
    out_.shrink_to_fit();
    ReleaseBody();
    if (!keep_alive_ || shared_->stopping) return Linger();
    NextRequest();
  }

  // Says that nothing follows, and reads on for a while, so that a client that is still sending
  // gets to see its answer.
  void Linger() {
    ErrorCode ignored;
    lingering_ = true;
    SetDeadline(kLingerSeconds);
    buffer_.clear();
    if constexpr (std::is_same_v<Stream, TlsStream>) {
      stream_.async_shutdown([self = this->shared_from_this()](ErrorCode) { self->Abandon(); });
    } else {
      stream_.shutdown(TcpSocket::shutdown_send, ignored);
      Read();
    }
  }

  // Drops the answer, which stops its work, and the socket.
  void Abandon() {
    if (std::exchange(closed_, true)) return;
    answer_.reset();
    answering_.reset();
    ErrorCode ignored;
    socket().close(ignored);
  }

  const std::shared_ptr<HttpShared> shared_;
  Stream stream_;
  std::string peer_;
  std::vector<std::string> certificate_names_;
  std::array<char, kReadBytes> chunk_;  // being read
  std::string buffer_;                  // read, not parsed yet
  std::optional<Parser> parser_;
  std::unique_ptr<HttpAnswer> answer_;
  Self answering_;  // this, until the answer is whole: it may wait with nothing being read or written
  std::string out_;  // being written
  std::atomic<int64_t> deadline_s_{kNever};
  std::atomic<bool> woken_{false};
  int64_t claimed_ = 0;  // bytes of the body that is read or answered
  uint64_t discarded_ = 0;
  unsigned version_ = 11;
  bool keep_alive_ = true;
  bool head_ = false;
  bool reading_ = false;
  bool writing_ = false;
  bool streaming_ = false;
  bool chunked_ = false;
  bool answered_ = false;  // all of the answer is in `out_`
  bool continued_ = false;
  bool gated_ = false;  // the gate has seen the request
  bool lingering_ = false;
  bool closed_ = false;
};


}  // namespace

int64_t SteadySeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::shared_ptr<HttpConnection> MakeConnection(TcpSocket socket,
                                               std::shared_ptr<HttpShared> shared) {
  return std::make_shared<Connection<TcpSocket>>(std::move(shared), std::move(socket));
}

std::shared_ptr<HttpConnection> MakeTlsConnection(TcpSocket socket,
                                                  std::shared_ptr<asio::ssl::context> tls,
                                                  std::shared_ptr<HttpShared> shared) {
  return std::make_shared<Connection<TlsStream>>(std::move(shared), std::move(socket), *tls);
}

}  // namespace lorikeet
