#include "tests/tidy/rules.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <regex>
#include <sstream>
#include <string_view>
#include <utility>

namespace lorikeet::tidy {
namespace {

constexpr int kFileLines = 600;
constexpr int kFunctionLines = 70;

constexpr std::array<std::string_view, 11> kFolders = {
    "engine/base/",  "engine/tensor/",    "engine/api/",    "engine/memory/", "engine/kernels/",
    "engine/model/", "engine/scheduler/", "engine/runner/", "engine/",        "adapters_cache/",
    "server/"};

// The place of a path's folder in the order, or -1 outside of it.
int Place(std::string_view path) {
  for (size_t i = 0; i < kFolders.size(); ++i) {
    if (path.starts_with(kFolders[i])) return static_cast<int>(i);
  }
  return -1;
}

bool Reaches(std::string_view from, std::string_view to) {
  const int from_place = Place(from), to_place = Place(to);
  if (to_place > from_place) return false;
  if (to_place == from_place) return true;
  const std::string_view to_folder = kFolders[to_place];
  if (from.starts_with("engine/scheduler/")) {
    return to_folder != "engine/tensor/" && to_folder != "engine/kernels/" &&
           to_folder != "engine/model/";
  }
  if (from.starts_with("adapters_cache/")) return to_place <= Place("engine/memory/");
  return true;
}

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

std::string At(const SourceFile& file, size_t line_index, const std::string& what) {
  return file.path + ":" + std::to_string(line_index + 1) + ": " + what;
}

// {line index, path between the quotes or angles} of every #include.
std::vector<std::pair<size_t, std::string>> Includes(const SourceFile& file) {
  static const std::regex include(R"re(^\s*#\s*include\s*["<]([^">]+)[">])re");
  std::vector<std::pair<size_t, std::string>> found;
  const std::vector<std::string> lines = Lines(file.text);
  for (size_t i = 0; i < lines.size(); ++i) {
    std::smatch match;
    if (std::regex_search(lines[i], match, include)) found.emplace_back(i, match[1]);
  }
  return found;
}

bool IsHeader(std::string_view path) { return path.ends_with(".h") || path.ends_with(".cuh"); }

bool IsCode(std::string_view path) {
  return IsHeader(path) || path.ends_with(".cc") || path.ends_with(".cu");
}

size_t Indent(std::string_view line) { return std::min(line.find_first_not_of(' '), line.size()); }

Problems LongFunctions(const SourceFile& file, const std::vector<std::string>& lines,
                       size_t indent) {
  Problems problems;
  const std::string close = std::string(indent, ' ') + "}";
  size_t start = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (lines[i] == close) {
      const size_t length = i - start + 1;
      if (length > kFunctionLines) {
        problems.push_back(At(file, start,
                              "a block of " + std::to_string(length) + " lines, " +
                                  std::to_string(kFunctionLines) + " at most"));
      }
    } else if (Indent(lines[i]) == indent &&
               (std::isalpha(lines[i][indent]) || lines[i][indent] == '_')) {  // __global__
      start = i;
    }
  }
  return problems;
}

}  // namespace

Problems IncludeOrder(const SourceFile& file) {
  Problems problems;
  if (!IsCode(file.path) || Place(file.path) < 0) return problems;
  for (const auto& [line, path] : Includes(file)) {
    if (path.starts_with("tests/") || (Place(path) >= 0 && !Reaches(file.path, path))) {
      problems.push_back(At(file, line, "may not include " + path));
    }
  }
  return problems;
}

Problems ServerLibraries(const SourceFile& file) {
  static const std::regex library(
      "^(grpc/|grpcpp/|google/protobuf/|prometheus/|yaml-cpp/|boost/|lorikeet/v1/|opentelemetry/)");
  Problems problems;
  const bool served = file.path.starts_with("server/") || file.path.starts_with("tests/");
  if (!IsCode(file.path) || served) return problems;
  for (const auto& [line, path] : Includes(file)) {
    if (std::regex_search(path, library)) {
      problems.push_back(At(file, line, path + " belongs under server alone"));
    }
  }
  return problems;
}

Problems CudaHeaders(const SourceFile& file) {
  static const std::regex library(
      "^(cuda|cublas|nvml|nvrtc|nvtx3/|nccl|cub/|thrust/|mma\\.h|cooperative_groups|device_|"
      "driver_types|vector_types)");
  Problems problems;
  for (const char* folder : {"engine/kernels/cuda/", "tests/gpu/", "bench/"}) {
    if (file.path.starts_with(folder)) return problems;
  }
  if (!IsCode(file.path)) return problems;
  for (const auto& [line, path] : Includes(file)) {
    if (std::regex_search(path, library)) {
      problems.push_back(At(file, line, path + " belongs under engine/kernels/cuda alone"));
    }
  }
  return problems;
}

Problems PragmaOnce(const SourceFile& file) {
  if (!IsHeader(file.path) || file.text.find("#pragma once") != std::string::npos) return {};
  return {At(file, 0, "no #pragma once")};
}

Problems Sizes(const SourceFile& file) {
  const std::vector<std::string> lines = Lines(file.text);
  Problems problems;
  if (!IsCode(file.path)) return problems;
  if (lines.size() > kFileLines) {
    problems.push_back(
        At(file, 0,
           std::to_string(lines.size()) + " lines, " + std::to_string(kFileLines) + " at most"));
  }
  if (file.path.starts_with("tests/")) return problems;
  for (const size_t indent : {0, 2}) {
    for (std::string& problem : LongFunctions(file, lines, indent)) {
      problems.push_back(std::move(problem));
    }
  }
  return problems;
}

Problems MachinePaths(const SourceFile& file) {
  // In two parts, or this line would be one.
  static const std::regex machine(std::string("(^|[^A-Za-z0-9_.~}/-])/(ro") +
                                  "ot|home|wo"
                                  "rk|Users|mnt)/[A-Za-z0-9_.]");
  Problems problems;
  const std::vector<std::string> lines = Lines(file.text);
  for (size_t i = 0; i < lines.size(); ++i) {
    if (std::regex_search(lines[i], machine)) {
      problems.push_back(At(file, i, "a path of one machine: " + lines[i]));
    }
  }
  return problems;
}

Problems FeatureRows(const SourceFile& readme, const std::set<std::string>& tests) {
  static const std::regex name("`([^`]+)`");
  Problems problems;
  bool in_table = false;
  int rows = 0;
  const std::vector<std::string> lines = Lines(readme.text);
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string& line = lines[i];
    if (line.starts_with("| feature | test |")) {
      in_table = true;
    } else if (!line.starts_with("|")) {
      in_table = false;
    } else if (in_table && !line.starts_with("|---")) {
      ++rows;
      const size_t last_cell = line.rfind('|', line.size() - 2);
      const std::string cell = line.substr(last_cell);
      std::sregex_iterator match(cell.begin(), cell.end(), name), end;
      if (match == end) problems.push_back(At(readme, i, "a feature without a test"));
      for (; match != end; ++match) {
        if (!tests.contains((*match)[1])) {
          problems.push_back(At(readme, i, "there is no test " + (*match)[1].str()));
        }
      }
    }
  }
  if (rows == 0) problems.push_back(readme.path + ": no feature table");
  return problems;
}

}  // namespace lorikeet::tidy
