// The device under test: each test program links one definition.
#pragma once

namespace lorikeet {

extern const char* const kTestDevice;  // "cpu" or "cuda", as RunnerOptions::device

}  // namespace lorikeet
