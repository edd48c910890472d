// One client's connection: reads requests, has them answered one after the other, writes.
//
// Everything happens on the connection's strand. One read is always under way, so that a client
// that left is noticed while its answer is made; bytes of a next request wait in the buffer, which
// is bounded, and then in the client. One write is under way at most, and pieces of a stream are
// asked for when it is done: a slow reader costs one piece. A piece that the socket takes at once,
// as it takes nearly every token's, leaves without a wait.
#pragma once

#include <atomic>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <cstdint>
#include <memory>

#include "server/http/limits.h"
#include "server/http/message.h"
#include "server/http/wake_queue.h"

namespace lorikeet {

// What the connections of a server have in common.
struct HttpShared {
  explicit HttpShared(boost::asio::io_context* io) : wakes(io) {}

  HttpHandler handler;
  HttpGate gate;  // nullptr: every body is read
  HttpLimits limits;
  std::atomic<int64_t> bodies_bytes{0};
  std::atomic<bool> stopping{false};
  WakeQueue wakes;
};

class HttpConnection : public WakeQueue::Sleeper {
 public:
  virtual void Start() = 0;
  // Any thread. Closes if the deadline has passed by `now_s`, on the steady clock.
  virtual void CloseIfLate(int64_t now_s) = 0;
  virtual void Close() = 0;  // any thread
};

using TcpSocket = boost::asio::ip::tcp::socket;
using TlsStream = boost::asio::ssl::stream<TcpSocket>;

// The socket's executor must be a strand.
std::shared_ptr<HttpConnection> MakeConnection(TcpSocket socket, std::shared_ptr<HttpShared> shared);
std::shared_ptr<HttpConnection> MakeTlsConnection(TcpSocket socket,
                                                  std::shared_ptr<boost::asio::ssl::context> tls,
                                                  std::shared_ptr<HttpShared> shared);

int64_t SteadySeconds();

}  // namespace lorikeet
