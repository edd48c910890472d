#include "server/listen.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"

namespace lorikeet {
namespace {

// errno of trying, 0 if it worked.
int TryListen(const addrinfo& address) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  int error = 0;
  if (bind(fd, address.ai_addr, address.ai_addrlen) != 0 || listen(fd, 1) != 0) error = errno;
  close(fd);
  return error;
}

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

// What `host` and `port` name, the first to listen on first; empty and `error` set if nothing.
Addresses Resolve(const std::string& host, int32_t port, int* error) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  *error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  return {*error == 0 ? found : nullptr, &freeaddrinfo};
}

bool IsLoopback(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return ntohl(reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr) >> 24 == 127;
  }
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

}  // namespace

bool IsLoopback(const std::string& host) {
  int error = 0;
  const Addresses found = Resolve(host, 0, &error);
  for (const addrinfo* at = found.get(); at != nullptr; at = at->ai_next) {
    if (!IsLoopback(at->ai_addr)) return false;
  }
  return found != nullptr;
}

bool IsFixedHost(std::string_view host_port) {
  std::string host(host_port.substr(0, host_port.rfind(':')));
  unsigned char address[sizeof(in6_addr)];
  if (host_port.starts_with('[')) {
    host = host_port.substr(1, host_port.find(']') - 1);
    return inet_pton(AF_INET6, host.c_str(), address) == 1;
  }
  return host == "localhost" || inet_pton(AF_INET, host.c_str(), address) == 1;
}

std::string HostPort(const std::string& host, int32_t port) {
  const bool ipv6 = host.find(':') != std::string::npos && host.front() != '[';
  return ipv6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

std::string HealthSocket(int32_t port) { return absl::StrCat("unix-abstract:lorikeet-", port); }

absl::Status CheckCanListen(const std::string& host, int32_t port, const std::string& what) {
  int failed = 0;
  const Addresses found = Resolve(host, port, &failed);
  if (failed != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": no address '", host, "': ", gai_strerror(failed)));
  }
  const int error = TryListen(*found);
  if (error == 0) return absl::OkStatus();
  const std::string where = absl::StrCat(what, " ", HostPort(host, port));
  if (error == EADDRINUSE) return absl::UnavailableError(where + " is already in use");
  if (error == EACCES) return absl::PermissionDeniedError(where + ": permission denied");
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", std::strerror(error)));
}

}  // namespace lorikeet
