// TLS of the HTTP port: its certificates, and the names of its peers.
#pragma once

#include <openssl/ssl.h>

#include <boost/asio/ssl/context.hpp>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/tls_files.h"

namespace lorikeet {

// TLS 1.2 and 1.3 with these files. INVALID_ARGUMENT names the file and what is wrong with it: it
// cannot be read, is no PEM, or the key is not the certificate's. REQUIRES: files.on().
absl::StatusOr<std::shared_ptr<boost::asio::ssl::context>> LoadTls(const TlsFiles& files);

// The names in the client certificate that was verified, as gRPC gives them: the alternative ones
// that are a host or URI, then the common name. Empty: there is no such certificate.
std::vector<std::string> PeerNames(const SSL* ssl);

}  // namespace lorikeet
