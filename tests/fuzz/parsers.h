// The property every parser of files holds for any bytes: it answers with a Status or with values
// that lie inside the input. A broken property aborts. Run by libFuzzer (the *_fuzz programs) and,
// on mutations of valid files, by tests/fuzz/mutation_test.cc.
#pragma once

#include <cstddef>
#include <span>

namespace lorikeet::testing {

void FuzzSafetensors(std::span<const std::byte> bytes);
void FuzzGguf(std::span<const std::byte> bytes);      // the container, then its configuration
void FuzzHfConfig(std::span<const std::byte> bytes);  // config.json
void FuzzCheckpoint(std::span<const std::byte> bytes);       // safetensors with NF4 or FP8

}  // namespace lorikeet::testing
