#include "server/text/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

std::vector<size_t> Borders(const std::string& text) {
  std::vector<size_t> border(text.size() + 1, 0);
  for (size_t i = 1; i < text.size(); ++i) {
    size_t k = border[i];
    while (k > 0 && text[i] != text[k]) k = border[k];
    border[i + 1] = k + (text[i] == text[k] ? 1 : 0);
  }
  return border;
}

}  // namespace

absl::StatusOr<StopMatcher> StopMatcher::Create(std::vector<std::string> stops, bool include_stop) {
  std::vector<Stop> matchers;
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty()) {
      return absl::InvalidArgumentError(absl::StrCat("stop string ", i, " is empty"));
    }
    LK_RETURN_IF_ERROR(ValidateUtf8(stops[i], absl::StrCat("stop string ", i)));
    std::vector<size_t> border = Borders(stops[i]);
    matchers.push_back({std::move(stops[i]), std::move(border), 0});
  }
  return StopMatcher(std::move(matchers), include_stop);
}

bool StopMatcher::Push(std::string_view text, std::string* out) {
  if (stopped()) return true;
  for (const char c : text) {
    held_.push_back(c);
    for (size_t i = 0; i < stops_.size(); ++i) {
      Stop& stop = stops_[i];
      while (stop.matched > 0 && stop.text[stop.matched] != c) {
        stop.matched = stop.border[stop.matched];
      }
      if (stop.text[stop.matched] == c) ++stop.matched;
      const bool complete = stop.matched == stop.text.size();
      if (complete && (!matched_ || stop.text.size() > stops_[*matched_].text.size())) {
        matched_ = i;
      }
    }
    if (matched_) {
      const size_t tail = include_stop_ ? 0 : stops_[*matched_].text.size();
      out->append(held_, 0, held_.size() - tail);
      held_.clear();
      return true;
    }
  }
  size_t undecided = 0;
  for (const Stop& stop : stops_) undecided = std::max(undecided, stop.matched);
  out->append(held_, 0, held_.size() - undecided);
  held_.erase(0, held_.size() - undecided);
  return false;
}

void StopMatcher::Finish(std::string* out) {
  out->append(held_);
  held_.clear();
}

}  // namespace lorikeet
