// The registry's file and its log: what a crash at any point leaves of them.
#include "adapters_cache/registry_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;
namespace fs = std::filesystem;

RegistryRecords RecordsOf(int names) {
  RegistryRecords records;
  records.versions["v"] = {.id = "v", .variant = "lora", .path = "/somewhere"};
  for (int i = 0; i < names; ++i) records.names["n" + std::to_string(i)].targets = {{"v", 1}};
  return records;
}

// Kills a process that does what `change` does at its n-th system call, for every n there is.
void KillAtEveryCall(const fs::path& path, const std::function<absl::Status()>& change) {
  bool ended = false;
  int old_files = 0, new_files = 0;
  for (int kill_at = 1; !ended; ++kill_at) {
    ASSERT_TRUE(WriteRegistryFile(path, RecordsOf(1)).ok());
    const pid_t child = fork();
    if (child == 0) {
      ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
      raise(SIGSTOP);
      _exit(change().ok() ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    for (int stop = 0; stop < kill_at && !ended; ++stop) {
      ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);  // to the next entry or exit of a call
      ASSERT_EQ(waitpid(child, &status, 0), child);
      ended = WIFEXITED(status);
    }
    if (!ended) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
    }
    const auto records = ReadRegistryFile(path);
    ASSERT_TRUE(records.ok()) << "killed at stop " << kill_at << ": " << records.status();
    ASSERT_TRUE(records->names.size() == 1 || records->names.size() == 500) << kill_at;
    ++(records->names.size() == 1 ? old_files : new_files);
  }
  EXPECT_GT(old_files, 5);
  EXPECT_GT(new_files, 1);
}

TEST(RegistryFile, ACrashAtAnyPointLeavesWhatWasOrWhatIsToBe) {
  const TempDir dir;
  const fs::path path = dir.path() / "registry";
  KillAtEveryCall(path, [&] { return WriteRegistryFile(path, RecordsOf(500)); });
  KillAtEveryCall(path, [&] { return AppendToRegistryLog(path, RecordsOf(500), {}); });
}

TEST(RegistryFile, TheLogAddsReplacesAndRemovesAndATornLineIsNone) {
  const TempDir dir;
  const fs::path path = dir.path() / "registry";
  ASSERT_TRUE(WriteRegistryFile(path, RecordsOf(3)).ok());
  RegistryRecords changed;
  changed.versions["w"] = {.id = "w", .variant = "dora", .path = "/elsewhere"};
  changed.names["n1"] = {.targets = {{"w", 2}}, .pinned = true};
  ASSERT_TRUE(AppendToRegistryLog(path, changed, {"n0", "n2", "unknown"}).ok());
  const auto read = ReadRegistryFile(path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->names.size(), 1u);
  EXPECT_TRUE(read->names.at("n1").pinned);
  EXPECT_EQ(read->versions.size(), 1u) << "nothing leads to the other";
  fs::path log;
  for (const auto& file : fs::directory_iterator(dir.path())) {
    if (file.path().string().starts_with(path.string() + ".log-")) log = file.path();
  }
  std::ofstream(log, std::ios::app) << std::string(64, 'a') << "{\"half";
  EXPECT_EQ(ReadRegistryFile(path)->names.size(), 1u);
  std::ofstream(log, std::ios::app) << "\n";
  const absl::Status damaged = ReadRegistryFile(path).status();
  EXPECT_EQ(damaged.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(damaged.message()), HasSubstr(log.string() + " at byte "));
  ASSERT_TRUE(WriteRegistryFile(path, RecordsOf(3)).ok());
  EXPECT_FALSE(fs::exists(log));
}

}  // namespace
}  // namespace lorikeet
