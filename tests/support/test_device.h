// The device under test: each test program links one definition.
#pragma once

#include <filesystem>
#include <string_view>

#include "engine/base/check.h"
#include "engine/model/model_source.h"

namespace lorikeet {

extern const char* const kTestDevice;  // "cpu" or "cuda", as RunnerOptions::device

// A GPU does not compute layers with experts.
inline bool RunsOnTestDevice(const std::filesystem::path& model) {
  if (std::string_view(kTestDevice) == "cpu") return true;
  const auto source = ModelSource::Open(model);
  LK_CHECK_MSG(source.ok(), source.status().ToString());
  return (*source)->config().experts == 0;
}

}  // namespace lorikeet
