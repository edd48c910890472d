// The part of a tokenizer.json that puts BOS and EOS around a text; for the .cc files here alone.
#pragma once

#include <optional>

#include "nlohmann/json.hpp"
#include "server/text/tokenizer.h"

namespace lorikeet {

// JSON null where there is nothing to add.
nlohmann::ordered_json PostProcessorJson(const std::optional<NamedToken>& bos,
                                         const std::optional<NamedToken>& eos);

}  // namespace lorikeet
