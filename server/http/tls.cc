#include "server/http/tls.h"

#include <openssl/x509v3.h>

#include <boost/asio/ssl/verify_mode.hpp>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lorikeet {
namespace {

// A name with a zero byte in it would be read as another by whoever stops there.
void Add(const ASN1_STRING* text, std::vector<std::string>* names) {
  unsigned char* utf8 = nullptr;
  const int size = ASN1_STRING_to_UTF8(&utf8, text);
  if (size < 0) return;
  std::string name(reinterpret_cast<const char*>(utf8), size);
  OPENSSL_free(utf8);
  if (!name.empty() && name.find('\0') == std::string::npos) names->push_back(std::move(name));
}

void AddAlternatives(const X509* certificate, std::vector<std::string>* names) {
  const std::unique_ptr<GENERAL_NAMES, decltype(&GENERAL_NAMES_free)> alternatives(
      static_cast<GENERAL_NAMES*>(
          X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)),
      &GENERAL_NAMES_free);
  for (int i = 0; i < sk_GENERAL_NAME_num(alternatives.get()); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(alternatives.get(), i);
    if (name->type == GEN_DNS) Add(name->d.dNSName, names);
    if (name->type == GEN_URI) Add(name->d.uniformResourceIdentifier, names);
  }
}

absl::Status Wrong(const char* setting, const std::string& file,
                   const boost::system::error_code& error) {
  return absl::InvalidArgumentError(
      absl::StrCat(setting, ": '", file, "': ", error.message()));
}

}  // namespace

absl::StatusOr<std::shared_ptr<boost::asio::ssl::context>> LoadTls(const TlsFiles& files) {
  using Context = boost::asio::ssl::context;
  auto tls = std::make_shared<Context>(Context::tls_server);
  boost::system::error_code error;
  SSL_CTX_set_min_proto_version(tls->native_handle(), TLS1_2_VERSION);
  constexpr unsigned char kSessions[] = "lorikeet";  // clients with certificates need a name there
  SSL_CTX_set_session_id_context(tls->native_handle(), kSessions, sizeof kSessions - 1);
  tls->use_certificate_chain_file(files.certificate, error);
  if (error) return Wrong("tls-cert", files.certificate, error);
  tls->use_private_key_file(files.key, Context::pem, error);
  if (error) return Wrong("tls-key", files.key, error);
  if (files.client_ca.empty()) return tls;
  tls->load_verify_file(files.client_ca, error);
  if (error) return Wrong("tls-client-ca", files.client_ca, error);
  tls->set_verify_mode(boost::asio::ssl::verify_peer |
                       boost::asio::ssl::verify_fail_if_no_peer_cert);
  return tls;
}

std::vector<std::string> PeerNames(const SSL* ssl) {
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(SSL_get1_peer_certificate(ssl),
                                                                &X509_free);
  std::vector<std::string> names;
  if (certificate == nullptr || SSL_get_verify_result(ssl) != X509_V_OK) return names;
  AddAlternatives(certificate.get(), &names);
  X509_NAME* subject = X509_get_subject_name(certificate.get());
  const int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
  if (at >= 0) Add(X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)), &names);
  return names;
}

}  // namespace lorikeet
