#include "server/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0]++;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

std::string Describe(const std::string& help, const std::string& range, const std::string& unit,
                     const std::string& default_value) {
  std::string text = help;
  std::vector<std::string> notes;
  if (!range.empty()) notes.push_back(unit.empty() ? range : absl::StrCat(range, " ", unit));
  if (!default_value.empty()) notes.push_back(absl::StrCat("default ", default_value));
  if (!notes.empty()) absl::StrAppend(&text, " (", absl::StrJoin(notes, ", "), ")");
  return text;
}

absl::Status SetSwitch(const std::string& name, const std::string& text, bool* value) {
  if (text != "true" && text != "false") {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": '", text, "' is neither true nor false"));
  }
  *value = text == "true";
  return absl::OkStatus();
}

absl::Status AddPair(const std::string& name, const std::string& text, NamedPaths* values) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": '", text, "' is not NAME=PATH"));
  }
  std::string key = text.substr(0, equals);
  std::erase_if(*values, [&](const auto& pair) { return pair.first == key; });
  values->emplace_back(std::move(key), text.substr(equals + 1));
  return absl::OkStatus();
}

}  // namespace

std::string OptionTable::Row::Key() const {
  std::string key = name;
  std::replace(key.begin(), key.end(), '-', '_');
  return key;
}

absl::StatusOr<int64_t> ParseInt(std::string_view text, int64_t min, int64_t max,
                                 std::string_view what) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::invalid_argument || end != text.data() + text.size() || text.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(View(what), ": '", View(text), "' is not a whole number"));
  }
  if (error != std::errc() || value < min || value > max) {
    return absl::InvalidArgumentError(
        absl::StrCat(View(what), ": ", View(text), " is not in [", min, ", ", max, "]"));
  }
  return value;
}

absl::StatusOr<double> ParseReal(std::string_view text, double min, double max,
                                 std::string_view what) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::invalid_argument || end != text.data() + text.size() || text.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(View(what), ": '", View(text), "' is not a number"));
  }
  if (error != std::errc() || !(value >= min && value <= max)) {  // NaN fails too
    return absl::InvalidArgumentError(
        absl::StrCat(View(what), ": ", View(text), " is not in [", min, ", ", max, "]"));
  }
  return value;
}

std::string NearestName(std::string_view word, std::span<const std::string> candidates) {
  LK_CHECK(!candidates.empty());
  return *std::min_element(candidates.begin(), candidates.end(),
                           [&](const std::string& a, const std::string& b) {
                             return EditDistance(word, a) < EditDistance(word, b);
                           });
}

void OptionTable::Custom(std::string name, std::string placeholder, std::string help,
                         std::function<absl::Status(const std::string&)> set) {
  rows_.push_back(
      {std::move(name), Kind::kValue, std::move(placeholder), std::move(help), std::move(set)});
}

void OptionTable::Int(std::string name, int32_t min, int32_t max, std::string unit,
                      std::string help, int32_t* value) {
  const std::string text =
      Describe(help, absl::StrCat(min, " to ", max), unit, absl::StrCat(*value));
  Custom(name, "N", text, [=](const std::string& input) -> absl::Status {
    LK_ASSIGN_OR_RETURN(const int64_t parsed, ParseInt(input, min, max, name));
    *value = static_cast<int32_t>(parsed);
    return absl::OkStatus();
  });
}

void OptionTable::Real(std::string name, double min, double max, std::string unit, std::string help,
                       double* value) {
  const std::string text =
      Describe(help, absl::StrCat(min, " to ", max), unit, absl::StrCat(*value));
  Custom(name, "X", text, [=](const std::string& input) -> absl::Status {
    LK_ASSIGN_OR_RETURN(*value, ParseReal(input, min, max, name));
    return absl::OkStatus();
  });
}

void OptionTable::Text(std::string name, std::string placeholder, std::string help,
                       std::string* value) {
  Custom(std::move(name), std::move(placeholder), Describe(help, "", "", *value),
         [=](const std::string& input) {
           *value = input;
           return absl::OkStatus();
         });
}

void OptionTable::Choice(std::string name, std::vector<std::string> choices, std::string help,
                         std::string* value) {
  const std::string list = absl::StrJoin(choices, "|");
  Custom(name, list, Describe(help, "", "", *value), [=](const std::string& input) -> absl::Status {
    if (std::find(choices.begin(), choices.end(), input) == choices.end()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": '", input, "' is none of ", list));
    }
    *value = input;
    return absl::OkStatus();
  });
}

void OptionTable::Switch(std::string name, std::string help, bool* value) {
  auto set = [=](const std::string& input) { return SetSwitch(name, input, value); };
  rows_.push_back({name, Kind::kSwitch, "", std::move(help), set});
}

void OptionTable::List(std::string name, std::string placeholder, std::string help,
                       std::vector<std::string>* values) {
  auto set = [=](const std::string& input) {
    values->push_back(input);
    return absl::OkStatus();
  };
  rows_.push_back({std::move(name), Kind::kList, std::move(placeholder),
                   absl::StrCat(help, " (may be repeated)"), set});
}

void OptionTable::Pairs(std::string name, std::string placeholder, std::string help,
                        NamedPaths* values) {
  auto set = [=](const std::string& input) { return AddPair(name, input, values); };
  rows_.push_back(
      {name, Kind::kPairs, std::move(placeholder), absl::StrCat(help, " (may be repeated)"), set});
}

absl::StatusOr<const OptionTable::Row*> OptionTable::FindKey(std::string_view key) const {
  std::vector<std::string> keys;
  for (const Row& row : rows_) {
    keys.push_back(row.Key());
    if (keys.back() == key) return &row;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown key '", View(key), "'; did you mean '", NearestName(key, keys), "'?"));
}

absl::StatusOr<std::vector<std::string>> OptionTable::ParseFlags(
    std::span<const std::string> args) const {
  std::vector<std::string> positional;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg == "--") {
      positional.insert(positional.end(), args.begin() + i + 1, args.end());
      break;
    }
    if (arg.size() < 2 || arg[0] != '-') {
      positional.push_back(arg);
      continue;
    }
    const size_t equals = arg.find('=');
    const std::string flag = arg.substr(0, equals);
    const auto row = std::find_if(rows_.begin(), rows_.end(), [&](const Row& candidate) {
      return flag == absl::StrCat("--", candidate.name);
    });
    if (row == rows_.end()) {
      std::vector<std::string> flags;
      for (const Row& known : rows_) flags.push_back(absl::StrCat("--", known.name));
      return absl::InvalidArgumentError(absl::StrCat("unknown flag '", flag, "'; did you mean '",
                                                     NearestName(flag, flags), "'?"));
    }
    std::string value = "true";
    if (equals != std::string::npos) {
      value = arg.substr(equals + 1);
    } else if (row->kind != Kind::kSwitch) {
      if (i + 1 == args.size()) {
        return absl::InvalidArgumentError(absl::StrCat(flag, " needs a value ", row->placeholder));
      }
      value = args[++i];
    }
    const absl::Status status = row->set(value);
    if (!status.ok()) return absl::Status(status.code(), absl::StrCat("--", status.message()));
  }
  return positional;
}

std::string OptionTable::Help() const {
  size_t width = 0;
  std::vector<std::string> left;
  for (const Row& row : rows_) {
    left.push_back(row.placeholder.empty() ? absl::StrCat("--", row.name)
                                           : absl::StrCat("--", row.name, " ", row.placeholder));
    width = std::max(width, left.back().size());
  }
  std::string text;
  for (size_t i = 0; i < rows_.size(); ++i) {
    absl::StrAppend(&text, "  ", left[i], std::string(width - left[i].size() + 2, ' '),
                    rows_[i].help, "\n");
  }
  return text;
}

}  // namespace lorikeet
