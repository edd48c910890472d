// SHA-256 (FIPS 180-4) of bytes that come in pieces.
#pragma once

#include <openssl/evp.h>

#include <memory>
#include <string>
#include <string_view>

#include "absl/strings/escaping.h"
#include "engine/base/check.h"

namespace lorikeet {

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    LK_CHECK(context_ != nullptr);
    LK_CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }
  void Add(const void* data, size_t bytes) {
    LK_CHECK(EVP_DigestUpdate(context_.get(), data, bytes) == 1);
  }
  void Add(std::string_view text) { Add(text.data(), text.size()); }

  // 64 lower-case hexadecimal digits. Once.
  std::string Hex() {
    unsigned char digest[32];
    LK_CHECK(EVP_DigestFinal_ex(context_.get(), digest, nullptr) == 1);
    return absl::BytesToHexString(
        absl::string_view(reinterpret_cast<const char*>(digest), sizeof(digest)));
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace lorikeet
