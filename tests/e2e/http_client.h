// A connection that sends what a test says, well-formed or not, and reads what comes.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace lorikeet {

struct HttpResult {
  int status = 0;  // 0: the connection ended without an answer
  std::string head;
  std::string body;  // chunks joined

  nlohmann::json json() const { return nlohmann::json::parse(body, nullptr, false); }
  // The payloads of server-sent events.
  std::vector<std::string> events() const {
    std::vector<std::string> found;
    for (size_t at = 0, end; (end = body.find("\n\n", at)) != std::string::npos; at = end + 2) {
      if (body.compare(at, 6, "data: ") == 0) found.push_back(body.substr(at + 6, end - at - 6));
    }
    return found;
  }
};

class HttpClient {
 public:
  explicit HttpClient(int port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  virtual ~HttpClient() { Close(); }
  HttpClient(const HttpClient&) = delete;

  int fd() const { return fd_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

  // False once the server has closed.
  bool Send(const std::string& bytes) {
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t n = WriteSome(&bytes[sent], bytes.size() - sent);
      if (n <= 0) return false;
      sent += static_cast<size_t>(n);
    }
    return true;
  }

  // The next answer on the connection.
  HttpResult Receive() {
    HttpResult result;
    size_t end;
    while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
      if (!Fill()) return result;
    }
    result.head = Take(end + 4);
    result.status = std::stoi(result.head.substr(9, 3));
    if (Header(result.head, "Transfer-Encoding") == "chunked") {
      while (ReadChunk(&result.body)) continue;
    } else if (const std::string length = Header(result.head, "Content-Length"); !length.empty()) {
      while (buffer_.size() < std::stoul(length) && Fill()) continue;
      result.body = Take(std::stoul(length));
    } else if (result.status != 100) {
      while (Fill()) continue;
      result.body = Take(buffer_.size());
    }
    return result;
  }

  // All that comes until the server closes.
  std::string Rest() {
    while (Fill()) continue;
    return Take(buffer_.size());
  }

  HttpResult Get(const std::string& path) {
    Send(absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: test\r\n", headers_, "\r\n"));
    return Receive();
  }
  HttpResult Post(const std::string& path, const std::string& body) {
    SendPost(path, body);
    return Receive();
  }
  void SendPost(const std::string& path, const std::string& body) {
    Send(absl::StrCat("POST ", path, " HTTP/1.1\r\nHost: test\r\n", headers_,
                      "Content-Type: application/json\r\nContent-Length: ", body.size(),
                      "\r\n\r\n", body));
  }
  // The JSON that answers a POST of `body`, with this status.
  nlohmann::json Ask(const std::string& path, const nlohmann::json& body, int status = 200) {
    const HttpResult result = Post(path, body.dump());
    EXPECT_EQ(result.status, status) << result.body;
    return result.json();
  }
  // Lines that go with every request, each ending in "\r\n".
  void set_headers(std::string headers) { headers_ = std::move(headers); }

  static std::string Header(const std::string& head, const std::string& name) {
    const size_t at = head.find("\r\n" + name + ": ");
    if (at == std::string::npos) return {};
    const size_t begin = at + name.size() + 4;
    return head.substr(begin, head.find("\r\n", begin) - begin);
  }

 protected:
  // Signals, such as libFuzzer's alarms, end neither.
  virtual ssize_t ReadSome(char* bytes, size_t size) {
    return TEMP_FAILURE_RETRY(read(fd_, bytes, size));
  }
  virtual ssize_t WriteSome(const char* bytes, size_t size) {
    return TEMP_FAILURE_RETRY(send(fd_, bytes, size, MSG_NOSIGNAL));
  }

 private:
  bool Fill() {
    char bytes[16384];
    const ssize_t n = ReadSome(bytes, sizeof bytes);
    if (n <= 0) return false;
    buffer_.append(bytes, static_cast<size_t>(n));
    return true;
  }
  std::string Take(size_t size) {
    const std::string taken = buffer_.substr(0, size);
    buffer_.erase(0, size);
    return taken;
  }
  // False after the last one.
  bool ReadChunk(std::string* body) {
    size_t line;
    while ((line = buffer_.find("\r\n")) == std::string::npos) {
      if (!Fill()) return false;
    }
    const size_t size = std::stoul(buffer_, nullptr, 16);
    while (buffer_.size() < line + 2 + size + 2) {
      if (!Fill()) return false;
    }
    body->append(buffer_, line + 2, size);
    Take(line + 2 + size + 2);
    return size > 0;
  }

  int fd_;
  std::string headers_;
  std::string buffer_;
};

}  // namespace lorikeet
