// What TLS connections know of their peers.
#pragma once

#include <openssl/ssl.h>

#include <string>

namespace lorikeet {

// The common name of the client certificate that was verified; empty: there is none.
std::string PeerIdentity(const SSL* ssl);

}  // namespace lorikeet
