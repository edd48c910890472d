// A small HTTP server on loopback that answers as a test wants, also as no server should.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"

namespace lorikeet::testing {

class HttpPeer {
 public:
  // What is sent, byte for byte, before the connection is closed; "STALL": nothing, for ever.
  using Answer = std::function<std::string(const std::string& request)>;

  explicit HttpPeer(Answer answer) : answer_(std::move(answer)) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    LK_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
    LK_CHECK(listen(listener_, 64) == 0);
    socklen_t length = sizeof(address);
    LK_CHECK(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length) == 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Loop(); });
  }
  ~HttpPeer() {
    stop_ = true;
    shutdown(listener_, SHUT_RDWR);
    thread_.join();
    for (std::thread& thread : connections_) thread.join();
    close(listener_);
  }

  std::string url() const { return absl::StrCat("http://127.0.0.1:", port_); }
  std::vector<std::string> requests() const {
    std::lock_guard lock(mutex_);
    return requests_;
  }

  static std::string Reply(int status, const std::string& body, const std::string& headers = "") {
    return absl::StrCat("HTTP/1.1 ", status, " Some Reason\r\nContent-Length: ", body.size(),
                        "\r\nConnection: close\r\n", headers, "\r\n", body);
  }

 private:
  void Loop() {
    while (!stop_) {
      const int connection = accept(listener_, nullptr, nullptr);
      if (connection < 0) return;
      connections_.emplace_back([this, connection] { Serve(connection); });
    }
  }
  void Serve(int connection) {
    std::string request;
    char buffer[4096];
    while (request.find("\r\n\r\n") == std::string::npos) {
      const ssize_t got = recv(connection, buffer, sizeof(buffer), 0);
      if (got <= 0) break;
      request.append(buffer, got);
    }
    {
      std::lock_guard lock(mutex_);
      requests_.push_back(request);
    }
    const std::string reply = answer_(request);
    if (reply == "STALL") {
      while (!stop_ && recv(connection, buffer, sizeof(buffer), MSG_DONTWAIT) != 0) usleep(5000);
    }
    for (size_t at = 0; reply != "STALL" && at < reply.size();) {
      const ssize_t sent = send(connection, reply.data() + at, reply.size() - at, MSG_NOSIGNAL);
      if (sent <= 0) break;
      at += sent;
    }
    close(connection);
  }

  const Answer answer_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stop_{false};
  mutable std::mutex mutex_;
  std::vector<std::string> requests_;
  std::vector<std::thread> connections_;
  std::thread thread_;
};

}  // namespace lorikeet::testing
