// Early return on a bad absl::Status / absl::StatusOr.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define LK_CONCAT_INNER(a, b) a##b
#define LK_CONCAT(a, b) LK_CONCAT_INNER(a, b)

#define LK_RETURN_IF_ERROR(expression)                        \
  do {                                                        \
    absl::Status lk_status = (expression);                    \
    if (!lk_status.ok()) [[unlikely]] return lk_status;       \
  } while (0)

#define LK_ASSIGN_OR_RETURN(target, expression) \
  LK_ASSIGN_OR_RETURN_IMPL(LK_CONCAT(lk_result_, __LINE__), target, expression)

#define LK_ASSIGN_OR_RETURN_IMPL(result, target, expression)  \
  auto result = (expression);                                 \
  if (!result.ok()) [[unlikely]] return result.status();      \
  target = std::move(result).value()
