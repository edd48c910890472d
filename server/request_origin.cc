#include "server/request_origin.h"

#include <algorithm>

#include "server/random.h"

namespace lorikeet {
namespace {

constexpr size_t kMostIdBytes = 128;

bool Acceptable(std::string_view id) {
  return !id.empty() && id.size() <= kMostIdBytes &&
         std::ranges::all_of(id, [](char c) { return c > ' ' && c <= '~'; });
}

}  // namespace

RequestOrigin MakeOrigin(std::string_view request_id, std::string_view traceparent) {
  return {.id = Acceptable(request_id) ? std::string(request_id) : RandomHex(24),
          .traceparent = std::string(traceparent)};
}

}  // namespace lorikeet
