// The server's log, on standard output: a line of text or a JSON object an event. Standard error is
// for the one line of a failure to start.
//
// Any thread. A line is written at once, so a reader that stalls stalls whoever writes; the engine's
// thread writes none.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace lorikeet {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError };

// "debug", "info", "warning", "error". INVALID_ARGUMENT names them.
absl::StatusOr<LogLevel> ParseLogLevel(std::string_view name);
const char* LogLevelName(LogLevel level);

// Of the process, as there is one standard output. At first text of level info and above.
void SetLogJson(bool json);
void SetLogLevel(LogLevel least);
LogLevel CurrentLogLevel();

// `fields`: a JSON object. As text: "message key=value ...".
void Log(LogLevel level, const std::string& message,
         const nlohmann::ordered_json& fields = nlohmann::ordered_json::object());

}  // namespace lorikeet
