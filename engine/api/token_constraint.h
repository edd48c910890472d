// What an answer may look like: which tokens may come next, asked before every token.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"

namespace lorikeet {

// One thread at a time: the engine's, or one that the engine waits for.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;

  // At its beginning, of its own.
  virtual std::unique_ptr<TokenConstraint> Clone() const = 0;

  // Sets bit t % 32 of allowed[t / 32] where token t may come next and clears all others. Where the
  // answer may end, end-of-sequence tokens may come next. An error allows nothing.
  virtual absl::Status Allowed(std::span<uint32_t> allowed) = 0;
  // REQUIRES: `token` was allowed.
  virtual absl::Status Accept(int32_t token) = 0;
  // Nothing but an end of sequence may come.
  virtual bool finished() const = 0;
};

}  // namespace lorikeet
