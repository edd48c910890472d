// Holds the tree to tests/tidy/rules.h, and each rule to what it is there for.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>

#include "tests/tidy/rules.h"

namespace lorikeet::tidy {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

SourceFile Read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return {path.lexically_normal().generic_string(), text.str()};
}

// Everything people write; golden data is not.
std::vector<SourceFile> Tree() {
  static const std::set<std::string> kinds = {".h",     ".cc", ".cuh", ".cu", ".rs",  ".py",
                                              ".cmake", ".md", ".sh",  ".c",  ".txt", ".proto",
                                              ""};
  std::vector<SourceFile> files = {Read("README.md"), Read("ARCHITECTURE.md"),
                                   Read("CMakeLists.txt"), Read("CMakePresets.json")};
  for (const char* folder : {"engine", "adapters_cache", "server", "proto", "tests", "scripts",
                             "demo", "bench", "cmake", "deploy", ".ci"}) {
    if (!fs::exists(folder)) continue;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
      const bool built = entry.path().generic_string().find("/target/") != std::string::npos;
      if (!built && entry.is_regular_file() && kinds.contains(entry.path().extension())) {
        files.push_back(Read(entry.path()));
      }
    }
  }
  return files;
}

std::set<std::string> RegisteredTests() {
  std::set<std::string> names;
  FILE* pipe = popen("'" LORIKEET_CTEST "' --test-dir '" LORIKEET_BUILD "' -N", "r");
  if (pipe == nullptr) return names;
  const std::regex test(R"(Test\s+#\d+: (\S+))");
  std::array<char, 512> line;
  while (std::fgets(line.data(), line.size(), pipe) != nullptr) {
    std::cmatch match;
    if (std::regex_search(line.data(), match, test)) names.insert(match[1]);
  }
  pclose(pipe);
  return names;
}

std::string Repeat(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

TEST(TreeTest, KeepsEveryRule) {
  const std::vector<SourceFile> files = Tree();
  ASSERT_GT(files.size(), 100u) << "run me in the tree's root";
  for (const SourceFile& file : files) {
    EXPECT_THAT(IncludeOrder(file), IsEmpty());
    EXPECT_THAT(ServerLibraries(file), IsEmpty());
    EXPECT_THAT(CudaHeaders(file), IsEmpty());
    EXPECT_THAT(PragmaOnce(file), IsEmpty());
    EXPECT_THAT(Sizes(file), IsEmpty());
    EXPECT_THAT(MachinePaths(file), IsEmpty());
  }
}

TEST(TreeTest, ReadmeNamesTestsThereAre) {
  EXPECT_THAT(FeatureRows(Read("README.md"), RegisteredTests()), IsEmpty());
}

TEST(RuleTest, IncludesGoLeft) {
  const std::string upward = "#include \"engine/model/model.h\"\n";
  EXPECT_THAT(IncludeOrder({"engine/kernels/a.cc", upward}),
              ElementsAre("engine/kernels/a.cc:1: may not include engine/model/model.h"));
  EXPECT_THAT(IncludeOrder({"engine/scheduler/a.h", upward}).size(), 1);
  EXPECT_THAT(IncludeOrder({"adapters_cache/a.h", upward}).size(), 1);
  EXPECT_THAT(IncludeOrder({"engine/engine.cc", "\n#include \"server/service.h\"\n"}).size(), 1);
  EXPECT_THAT(IncludeOrder({"server/a.cc", "#include \"tests/support/x.h\"\n"}).size(), 1);
  EXPECT_THAT(IncludeOrder({"engine/kernels/cuda/a.cu", upward}).size(), 1);
  EXPECT_THAT(IncludeOrder({"engine/runner/a.cc", upward}), IsEmpty());
  EXPECT_THAT(IncludeOrder({"engine/model/a.cc", upward}), IsEmpty());
  EXPECT_THAT(IncludeOrder({"engine/scheduler/a.h", "#include \"engine/memory/page_pool.h\"\n"}),
              IsEmpty());
}

TEST(RuleTest, LibrariesOfTheServerStayThere) {
  for (const char* header : {"grpcpp/grpcpp.h", "google/protobuf/message.h", "yaml-cpp/yaml.h",
                             "prometheus/counter.h", "lorikeet/v1/generation.pb.h"}) {
    const std::string include = "#include <" + std::string(header) + ">\n";
    EXPECT_THAT(ServerLibraries({"engine/engine.cc", include}).size(), 1) << header;
    EXPECT_THAT(ServerLibraries({"server/metrics.cc", include}), IsEmpty()) << header;
  }
}

TEST(RuleTest, CudaStaysInItsFolder) {
  for (const char* header : {"cuda_runtime.h", "cublasLt.h", "cub/cub.cuh", "mma.h", "nccl.h"}) {
    const std::string include = "#include <" + std::string(header) + ">\n";
    EXPECT_THAT(CudaHeaders({"engine/memory/a.cc", include}).size(), 1) << header;
    EXPECT_THAT(CudaHeaders({"engine/kernels/cuda/a.cu", include}), IsEmpty()) << header;
    EXPECT_THAT(CudaHeaders({"bench/bench_lora.cu", include}), IsEmpty()) << header;
  }
}

TEST(RuleTest, HeadersArePragmaOnce) {
  EXPECT_THAT(PragmaOnce({"engine/a.cuh", "struct A;\n"}).size(), 1);
  EXPECT_THAT(PragmaOnce({"engine/a.h", "#ifndef A\n"}).size(), 1);
  EXPECT_THAT(PragmaOnce({"engine/a.h", "// A.\n#pragma once\n"}), IsEmpty());
}

TEST(RuleTest, FilesAndFunctionsFit) {
  EXPECT_THAT(Sizes({"engine/a.cc", Repeat("\n", 601)}), ElementsAre(HasSubstr("601 lines")));
  EXPECT_THAT(Sizes({"engine/a.cc", Repeat("\n", 600)}), IsEmpty());
  EXPECT_THAT(Sizes({"engine/a.cuh", Repeat("\n", 601)}).size(), 1);
  const std::string body68 = Repeat("  F();\n", 68), body69 = Repeat("  F();\n", 69);
  EXPECT_THAT(Sizes({"engine/a.cc", "\nvoid G() {\n" + body69 + "}\n"}),
              ElementsAre("engine/a.cc:2: a block of 71 lines, 70 at most"));
  EXPECT_THAT(Sizes({"engine/a.cc", "void G() {\n" + body68 + "}\n"}), IsEmpty());
  EXPECT_THAT(
      Sizes({"engine/a.h", "class C {\n  void G() {\n" + Repeat("    F();\n", 70) + "  }\n};\n"}),
      ElementsAre(HasSubstr("engine/a.h:2: a block of 72 lines")));
  EXPECT_THAT(Sizes({"engine/a.h", "class C {\n" + Repeat("  void G();\n", 100) + "};\n"}),
              IsEmpty());
}

TEST(RuleTest, NoPathOfOneMachine) {
  for (const char* folder : {"root", "home", "Users"}) {
    const std::string path = std::string("/") + folder + "/someone/x";
    EXPECT_THAT(MachinePaths({"scripts/a", "cd " + path + "\n"}).size(), 1) << path;
  }
  EXPECT_THAT(MachinePaths({"scripts/a", "cd /usr/lib\n"}), IsEmpty());
}

TEST(RuleTest, FeatureRowsNameTests) {
  const std::set<std::string> tests = {"a_test"};
  const std::string head = "| feature | test |\n|---|---|\n";
  EXPECT_THAT(FeatureRows({"README.md", head + "| `x` works | `a_test` |\n"}, tests), IsEmpty());
  EXPECT_THAT(FeatureRows({"README.md", head + "| x works | `b_test` |\n"}, tests),
              ElementsAre("README.md:3: there is no test b_test"));
  EXPECT_THAT(FeatureRows({"README.md", head + "| `x` works | |\n"}, tests).size(), 1);
  EXPECT_THAT(FeatureRows({"README.md", "no table\n"}, tests).size(), 1);
}

}  // namespace
}  // namespace lorikeet::tidy
