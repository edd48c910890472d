// A fixture: an adapter's directory that tests write, damage and load over a small base.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/format_table.h"
#include "adapters_cache/inspect.h"
#include "adapters_cache/normalise.h"
#include "engine/base/status_macros.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet::testing {

class AdapterDirectory : public ::testing::Test {
 protected:
  // A tensor of halves.
  void Put(const std::string& name, std::vector<int64_t> shape) {
    int64_t elements = 1;
    for (const int64_t d : shape) elements *= d;
    adapter_.tensors[name] = {DType::kF32, shape, std::vector<float>(elements, 0.5f)};
  }

  absl::StatusOr<std::shared_ptr<const Adapter>> Load(const NormaliseOptions& options = {}) {
    adapter_.Write(dir_.path());
    for (const auto& [name, expert] : experts_) expert.Write(dir_.path() / name);
    LK_ASSIGN_OR_RETURN(AdapterFiles files, ReadAdapterFiles(dir_.path(), {}));
    Problems problems;
    const RawAdapter raw = ParseAdapter(std::move(files), &problems);
    LK_RETURN_IF_ERROR(problems.ToStatus());
    warnings_ = raw.warnings;
    NormaliseOptions with_warnings = options;
    with_warnings.warnings = &warnings_;
    return Normalise(raw, base_, with_warnings);
  }

  void ExpectRefused(absl::StatusCode code, const std::vector<std::string>& says,
                     const NormaliseOptions& options = {}) {
    const absl::Status status = Load(options).status();
    EXPECT_EQ(status.code(), code) << status;
    for (const std::string& words : says) {
      EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(words));
    }
  }

  // Of the directory as the last Load wrote it.
  void ExpectReported(const std::vector<std::string>& lines) {
    const std::string report = FormatReport(InspectAdapter(dir_.path()));
    for (const std::string& line : lines) EXPECT_THAT(report, ::testing::HasSubstr(line));
  }

  const TestBase base_ = TestBase::Random(2);
  const TempDir dir_;
  TestAdapter adapter_;
  std::map<std::string, TestAdapter> experts_;  // by the directory below
  std::vector<std::string> warnings_;           // of the last Load
};

}  // namespace lorikeet::testing
