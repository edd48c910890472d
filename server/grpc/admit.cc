#include "server/grpc/admit.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>

#include <string>

namespace lorikeet {

absl::StatusOr<Client> AdmitCall(Access& access, const grpc::CallbackServerContext& call,
                                 std::optional<Role> role) {
  Credentials credentials;
  const auto& metadata = call.client_metadata();
  const auto found = metadata.find("authorization");
  if (found != metadata.end()) {
    credentials.authorization.assign(found->second.data(), found->second.size());
  }
  credentials.peer = call.peer();
  const auto connection = call.auth_context();
  if (connection != nullptr && connection->IsPeerAuthenticated()) {
    for (const char* property : {GRPC_X509_SAN_PROPERTY_NAME, GRPC_X509_CN_PROPERTY_NAME}) {
      for (const grpc::string_ref& name : connection->FindPropertyValues(property)) {
        credentials.certificate_names.emplace_back(name.data(), name.size());
      }
    }
  }
  return access.Admit(credentials, role);
}

}  // namespace lorikeet
