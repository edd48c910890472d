// Who makes a gRPC call, and what it brings along.
#pragma once

#include <grpcpp/server_context.h>

#include <optional>

#include "server/auth/access.h"
#include "server/request_origin.h"

namespace lorikeet {

// As Access::Admit, by the metadata "authorization" and the connection's client certificate. `name`:
// the method's, where it changes something.
absl::StatusOr<Client> AdmitCall(Access& access, const grpc::ServerContextBase& call,
                                 std::optional<Role> role, const char* name = "");

// By the metadata "x-request-id" and "traceparent".
RequestOrigin OriginOf(const grpc::ServerContextBase& call);

}  // namespace lorikeet
