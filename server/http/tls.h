// What TLS connections know of their peers.
#pragma once

#include <openssl/ssl.h>

#include <string>
#include <vector>

namespace lorikeet {

// The names in the client certificate that was verified, as gRPC gives them: the alternative ones
// that are a host or URI, then the common name. Empty: there is no such certificate.
std::vector<std::string> PeerNames(const SSL* ssl);

}  // namespace lorikeet
