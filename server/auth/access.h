// The one place that decides who may do what, for both ports.
//
// Who is refused a change of adapters is in the audit log.
//
// Without a keys file everyone is the same nameless caller, who may do everything, but change
// adapters only where the server was told that its callers are trusted.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "server/auth/audit_log.h"
#include "server/auth/identity.h"
#include "server/auth/keys_file.h"

namespace lorikeet {

// What a request brings to say who it is from.
struct Credentials {
  std::string authorization;                   // "Bearer KEY", or empty
  std::vector<std::string> certificate_names;  // of a client certificate that was verified
  std::string peer;                            // address
  std::string call;                            // what is asked for, to the audit log
};

// Thread-safe.
class Access {
 public:
  struct Options {
    std::string keys_file;         // empty: none
    bool trusted_callers = false;  // without keys: callers may change adapters
    bool open_metrics = false;     // with keys: the role metrics needs none
  };

  // `clock` and `audit` outlive it. NOT_FOUND, INVALID_ARGUMENT: the file, the line and what is wrong.
  static absl::StatusOr<std::unique_ptr<Access>> Open(const Options& options, const Clock* clock,
                                                      AuditLog* audit);

  // The client, if there is one who has the role (nullopt: any will do) and is within its rate. A
  // key counts before a certificate. UNAUTHENTICATED: no key or an unknown one; PERMISSION_DENIED:
  // without the role; RESOURCE_EXHAUSTED: over its rate.
  absl::StatusOr<Client> Admit(const Credentials& credentials, std::optional<Role> role);

  // The same before a request is read: it does not count towards the rate.
  absl::Status Check(const Credentials& credentials, std::optional<Role> role);

  // Writes down that a change is refused; `who`: nullptr where nobody is known. `Admit` and `Check` do it
  // themselves.
  void NoteRefusal(const Credentials& credentials, const Identity* who, const absl::Status& why);

  // Reads the keys again. An error leaves those from before.
  absl::Status Reload();

 private:
  // A minute's requests, refilled as time passes.
  struct Bucket {
    std::atomic<int64_t> spent_until_us{0};  // when all that was taken will have been refilled
  };
  struct Key {
    Caller caller;
    std::string sha256;
    int32_t requests_per_minute = 0;
    std::shared_ptr<Bucket> bucket;
  };
  struct Keys;

  Access(const Options& options, const Clock* clock, AuditLog* audit)
      : options_(options), clock_(clock), audit_(audit) {}

  std::shared_ptr<const Keys> keys() const;
  std::shared_ptr<Bucket> BucketOf(const std::string& id) const;
  absl::StatusOr<const Key*> Find(const Keys& keys, const Credentials& credentials) const;
  absl::StatusOr<Caller> Identify(const Credentials& credentials, bool counts);
  absl::StatusOr<Client> Decide(const Credentials& credentials, std::optional<Role> role,
                                bool counts);
  absl::Status TakeOne(const Key& key);

  const Options options_;
  const Clock* const clock_;
  AuditLog* const audit_;
  Caller anyone_;  // without a keys file
  mutable std::mutex mutex_;
  std::shared_ptr<const Keys> keys_;
};

}  // namespace lorikeet
