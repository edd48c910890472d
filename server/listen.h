// Whether a port can be listened on, in words that an operator understands.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace lorikeet {

// Listens on host:port for a moment; port 0 checks the host alone. UNAVAILABLE: in use;
// PERMISSION_DENIED: a port this user may not take; INVALID_ARGUMENT: no such address. `what` names
// the port in the message ("gRPC port").
absl::Status CheckCanListen(const std::string& host, int32_t port, const std::string& what);

// Whether only this machine can reach every address that `host` names.
bool IsLoopback(const std::string& host);

// Whether the host of "host" or "host:port" leads to the same place for everyone and for ever, as an
// address and "localhost" do.
bool IsFixedHost(std::string_view host_port);

// "host:port", an IPv6 address in brackets.
std::string HostPort(const std::string& host, int32_t port);

// Where gRPC finds the health of the server on this gRPC port, from the same machine or container
// alone: an abstract socket, so that no file is left behind.
std::string HealthSocket(int32_t port);

}  // namespace lorikeet
