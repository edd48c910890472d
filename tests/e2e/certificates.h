// Certificates for tests, made as they are needed.
#pragma once

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <memory>
#include <string>

#include "gtest/gtest.h"

namespace lorikeet {

struct Certificate {
  std::shared_ptr<X509> x509;
  std::shared_ptr<EVP_PKEY> pkey;

  std::string Pem() const {
    return Text([this](BIO* bio) { return PEM_write_bio_X509(bio, x509.get()); });
  }
  std::string KeyPem() const {
    return Text([this](BIO* bio) {
      return PEM_write_bio_PrivateKey(bio, pkey.get(), nullptr, nullptr, 0, nullptr, nullptr);
    });
  }

 private:
  template <typename Write>
  static std::string Text(const Write& write) {
    const std::unique_ptr<BIO, decltype(&BIO_free)> bio(BIO_new(BIO_s_mem()), &BIO_free);
    EXPECT_EQ(write(bio.get()), 1);
    char* data = nullptr;
    const long size = BIO_get_mem_data(bio.get(), &data);
    return std::string(data, static_cast<size_t>(size));
  }
};

// Signed by `issuer`, or by itself, a root, if there is none. `alternatives` as OpenSSL writes them:
// "DNS:localhost,IP:127.0.0.1".
inline Certificate MakeCertificate(const std::string& name, const Certificate* issuer,
                                   const std::string& alternatives = "") {
  Certificate made;
  made.pkey.reset(EVP_EC_gen("P-256"), &EVP_PKEY_free);
  made.x509.reset(X509_new(), &X509_free);
  X509* x509 = made.x509.get();
  static int serial = 1;
  X509_set_version(x509, X509_VERSION_3);
  ASN1_INTEGER_set(X509_get_serialNumber(x509), serial++);
  X509_gmtime_adj(X509_getm_notBefore(x509), -3600);
  X509_gmtime_adj(X509_getm_notAfter(x509), 3600);
  X509_set_pubkey(x509, made.pkey.get());
  X509_NAME_add_entry_by_txt(X509_get_subject_name(x509), "CN", MBSTRING_UTF8,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  const X509* signer = issuer == nullptr ? x509 : issuer->x509.get();
  X509_set_issuer_name(x509, X509_get_subject_name(signer));
  const auto extend = [x509](int kind, const char* value) {
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, nullptr, kind, value);
    EXPECT_NE(extension, nullptr) << value;
    X509_add_ext(x509, extension, -1);
    X509_EXTENSION_free(extension);
  };
  extend(NID_basic_constraints, issuer == nullptr ? "critical,CA:TRUE" : "CA:FALSE");
  if (!alternatives.empty()) extend(NID_subject_alt_name, alternatives.c_str());
  EVP_PKEY* signing = issuer == nullptr ? made.pkey.get() : issuer->pkey.get();
  EXPECT_GT(X509_sign(x509, signing, EVP_sha256()), 0);
  return made;
}

}  // namespace lorikeet
