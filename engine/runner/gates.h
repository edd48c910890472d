// What an adapter's gates are for a token.
#pragma once

#include <span>

#include "engine/api/adapter.h"

namespace lorikeet {

// From the token's final hidden state, as wide as the first layer. gates: [gating.width()], the
// experts of a set adjacent.
void EvaluateGates(const Gating& gating, std::span<const float> hidden, std::span<float> gates);

}  // namespace lorikeet
