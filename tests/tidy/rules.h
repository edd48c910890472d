// The rules of the source tree, each a function from a file to what is wrong with it.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace lorikeet::tidy {

struct SourceFile {
  std::string path;  // from the tree's root, "engine/base/check.h"
  std::string text;
};

using Problems = std::vector<std::string>;  // "path:line: what"

// A file includes only its own folder and what stands left of it; the scheduler reaches no tensor,
// kernel or model, and adapters_cache nothing of the engine but base, tensor, api and memory.
Problems IncludeOrder(const SourceFile& file);

// gRPC, Protobuf, HTTP, Prometheus and YAML stay under server.
Problems ServerLibraries(const SourceFile& file);

// CUDA stays under engine/kernels/cuda, its tests and the benchmarks.
Problems CudaHeaders(const SourceFile& file);

// A header says `#pragma once`.
Problems PragmaOnce(const SourceFile& file);

// At most 600 lines a file and 70 a function. Relies on clang-format's layout: what a line "}"
// closes began at the last line before it with the same indent.
Problems Sizes(const SourceFile& file);

// No path that exists on one machine alone.
Problems MachinePaths(const SourceFile& file);

// Every row of the README's feature table names at least one test, and only tests there are.
Problems FeatureRows(const SourceFile& readme, const std::set<std::string>& tests);

}  // namespace lorikeet::tidy
