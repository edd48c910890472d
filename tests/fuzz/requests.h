// The properties that what reads clients' and operators' text holds for any bytes: it refuses them
// with a status that says why, or takes them. A broken property aborts. Run by libFuzzer and, on
// mutations of valid text, by tests/fuzz/request_mutation_test.cc.
#pragma once

#include <cstddef>
#include <span>

namespace lorikeet::testing {

// A body of OpenAI's API or the adapter calls; the first byte chooses which.
void FuzzRequestBody(std::span<const std::byte> bytes);
// A URL's query, for the list of adapters.
void FuzzQuery(std::span<const std::byte> bytes);
// The keys file. What is taken can be written and read again.
void FuzzKeys(std::span<const std::byte> bytes);
// An answer of a model with tools: however it is cut into pieces, the same comes out.
void FuzzToolCalls(std::span<const std::byte> bytes);
// What a client sends to the HTTP port: it gets well-formed answers or none, and the port goes on.
void FuzzHttp(std::span<const std::byte> bytes);

}  // namespace lorikeet::testing
