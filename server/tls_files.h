// The certificate files of both ports.
#pragma once

#include <string>
#include <vector>

namespace lorikeet {

struct TlsFiles {
  std::string certificate;  // PEM, the server's first, then what leads to its root; empty: no TLS
  std::string key;          // PEM, the certificate's private key
  std::string client_ca;    // PEM: clients must have a certificate of these roots; empty: they need none

  bool on() const { return !certificate.empty(); }
  std::vector<std::string> paths() const {
    std::vector<std::string> all = {certificate, key};
    if (!client_ca.empty()) all.push_back(client_ca);
    return all;
  }
};

}  // namespace lorikeet
