// A table of typed options. One row is a flag, a configuration key, its range, unit, default and
// help text, so that none of these can disagree with another.
//
// A row's name is its flag without the dashes ("grpc-port"); as a key of a configuration file the
// dashes are underscores ("grpc_port"). The bound variables hold the defaults until set and must
// outlive the table.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lorikeet {

using NamedPaths = std::vector<std::pair<std::string, std::string>>;

class OptionTable {
 public:
  enum class Kind : uint8_t {
    kValue,   // one value; given twice on a command line, the last counts
    kSwitch,  // true or false; as a flag it takes no value
    kList,    // may be repeated; a sequence in a file
    kPairs,   // NAME=VALUE, may be repeated; a map in a file. A name given again replaces
  };

  struct Row {
    std::string name;
    Kind kind = Kind::kValue;
    std::string placeholder;  // "N", "PATH"
    std::string help;         // with unit, range and default
    std::function<absl::Status(const std::string& value)> set;

    std::string Key() const;  // as a key of a configuration file
  };

  // Numbers lie in [min, max]; `unit` may be empty ("tokens", "s").
  void Int(std::string name, int32_t min, int32_t max, std::string unit, std::string help,
           int32_t* value);
  void Real(std::string name, double min, double max, std::string unit, std::string help,
            double* value);
  void Text(std::string name, std::string placeholder, std::string help, std::string* value);
  void Choice(std::string name, std::vector<std::string> choices, std::string help,
              std::string* value);
  void Switch(std::string name, std::string help, bool* value);
  void List(std::string name, std::string placeholder, std::string help,
            std::vector<std::string>* values);
  void Pairs(std::string name, std::string placeholder, std::string help, NamedPaths* values);
  // Anything else: `set` parses, and its message names the value and the bound.
  void Custom(std::string name, std::string placeholder, std::string help,
              std::function<absl::Status(const std::string&)> set);

  const std::vector<Row>& rows() const { return rows_; }

  // The row a configuration key names. INVALID_ARGUMENT names the nearest key.
  absl::StatusOr<const Row*> FindKey(std::string_view key) const;

  // Sets every --flag value and --flag=value of `args`; the rest are positional arguments, which
  // are returned. After "--" everything is positional. INVALID_ARGUMENT names the flag, and the
  // nearest one if it is unknown.
  absl::StatusOr<std::vector<std::string>> ParseFlags(std::span<const std::string> args) const;

  // One line a row, for a terminal.
  std::string Help() const;

 private:
  std::vector<Row> rows_;
};

// Whole-string parsing; INVALID_ARGUMENT says "<what>: <value> is not ..." or names the bound.
absl::StatusOr<int64_t> ParseInt(std::string_view text, int64_t min, int64_t max,
                                 std::string_view what);
absl::StatusOr<double> ParseReal(std::string_view text, double min, double max,
                                 std::string_view what);

// The candidate with the smallest edit distance to `word`. REQUIRES: not empty.
std::string NearestName(std::string_view word, std::span<const std::string> candidates);

}  // namespace lorikeet
