#include "server/grpc/admit.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>

#include <string>

namespace lorikeet {
namespace {

// The first value; nothing if there is none.
std::string MetadataOf(const grpc::ServerContextBase& call, const char* key) {
  const auto found = call.client_metadata().find(key);
  if (found == call.client_metadata().end()) return {};
  return std::string(found->second.data(), found->second.size());
}

}  // namespace

absl::StatusOr<Client> AdmitCall(Access& access, const grpc::ServerContextBase& call,
                                 std::optional<Role> role, const char* name) {
  Credentials credentials;
  credentials.call = name;
  credentials.authorization = MetadataOf(call, "authorization");
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

RequestOrigin OriginOf(const grpc::ServerContextBase& call) {
  return MakeOrigin(MetadataOf(call, "x-request-id"), MetadataOf(call, "traceparent"));
}

}  // namespace lorikeet
