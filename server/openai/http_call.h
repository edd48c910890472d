// One request of the HTTP port, admitted, on its way to who answers it.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/auth/identity.h"
#include "server/http/message.h"

namespace lorikeet {

struct HttpCall {
  HttpRequest request;
  std::string name;    // what stands for {name} in its path, decoded
  Client client;       // nobody on open paths
  std::function<void()> wake;
};

using HttpOutcome = absl::StatusOr<std::unique_ptr<HttpAnswer>>;

}  // namespace lorikeet
