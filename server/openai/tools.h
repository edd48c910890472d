// Tools of chat completions: given to the model by its template, called in its answers.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/openai/fields.h"
#include "server/text/chat_template.h"
#include "server/text/grammar.h"

namespace lorikeet {

// What a request says of tools.
struct ToolOptions {
  std::string definitions_json;          // for the template; empty: the model is told of none
  std::vector<std::string> names;        // that may be called; none: answers are text alone
  bool one_call = false;                 // at most
  // What a forced call looks like, or an answer that may call strict tools.
  std::optional<GrammarSource> grammar;
  ToolStyle style = ToolStyle::kNone;    // how calls are written in answers
};

// Reads "tools", "tool_choice" and "parallel_tool_calls". `style`: the template's. A forced call is
// an array of {"name", "arguments"}, whatever the template's style.
ToolOptions ReadTools(Fields& fields, ToolStyle style);

struct ToolCall {
  std::string name;
  std::string arguments;  // JSON
};

// Parts an answer into text and calls as it comes. What may still become a call is held back, and
// what looks like one but names no tool there is stays text.
class ToolCallFinder {
 public:
  explicit ToolCallFinder(const ToolOptions* options) : options_(options) {}

  struct Found {
    std::string text;
    std::vector<ToolCall> calls;
  };
  Found Append(std::string_view text);
  Found Finish();  // nothing follows

  int calls() const { return calls_; }  // so far

 private:
  void TakeTagged(Found* found);
  void TakeWhole(Found* found);
  bool TakeCalls(std::string_view json, Found* found);

  const ToolOptions* options_;  // outlives this
  std::string held_;
  bool text_only_ = false;  // kWhole: it began with text
  int calls_ = 0;
};

}  // namespace lorikeet
