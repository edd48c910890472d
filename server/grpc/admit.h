// Who makes a gRPC call.
#pragma once

#include <grpcpp/server_context.h>

#include <optional>

#include "server/auth/access.h"

namespace lorikeet {

// As Access::Admit, by the metadata "authorization" and the connection's client certificate.
absl::StatusOr<Client> AdmitCall(Access& access, const grpc::CallbackServerContext& call,
                                 std::optional<Role> role);

}  // namespace lorikeet
