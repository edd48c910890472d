// Everything that is wrong with an adapter. Readers go on after a problem where that makes sense,
// so that people see the whole list at once; a load fails with all of it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace lorikeet {

// "a, b, c": at most 20 names, then how many more there are.
inline std::string ListNames(const std::vector<std::string>& names, const char* between = ", ") {
  constexpr size_t kMaxListed = 20;
  std::string all;
  for (size_t i = 0; i < names.size() && i < kMaxListed; ++i)
    all += (i == 0 ? std::string() : std::string(between)) + names[i];
  if (names.size() > kMaxListed) {
    all += " and " + std::to_string(names.size() - kMaxListed) + " more";
  }
  return all;
}

class Problems {
 public:
  void Add(absl::Status problem) { list_.push_back(std::move(problem)); }
  void Invalid(const std::string& message) { Add(absl::InvalidArgumentError(message)); }
  void Unserved(const std::string& message) { Add(absl::UnimplementedError(message)); }

  bool empty() const { return list_.empty(); }
  const std::vector<absl::Status>& list() const { return list_; }

  // OK, or the first problem's code with the messages.
  absl::Status ToStatus() const {
    if (list_.empty()) return absl::OkStatus();
    std::vector<std::string> messages;
    for (const absl::Status& problem : list_) messages.emplace_back(problem.message());
    return absl::Status(list_.front().code(), ListNames(messages, "; "));
  }

 private:
  std::vector<absl::Status> list_;
};

}  // namespace lorikeet
