#include "server/text/post_processor.h"

namespace lorikeet {

nlohmann::ordered_json PostProcessorJson(const std::optional<NamedToken>& bos,
                                         const std::optional<NamedToken>& eos) {
  using Json = nlohmann::ordered_json;
  if (!bos && !eos) return nullptr;
  const auto special = [](const NamedToken& token, int type) {
    return Json{{"SpecialToken", {{"id", token.text}, {"type_id", type}}}};
  };
  const auto sequence = [&](const char* id, int type) {
    Json parts = Json::array();
    if (bos) parts.push_back(special(*bos, type));
    parts.push_back({{"Sequence", {{"id", id}, {"type_id", type}}}});
    if (eos) parts.push_back(special(*eos, type));
    return parts;
  };
  const Json single = sequence("A", 0);
  Json pair = single;  // never used here, but the format asks for it
  for (const Json& part : sequence("B", 1)) pair.push_back(part);
  Json tokens = Json::object();
  for (const auto& token : {bos, eos}) {
    if (!token) continue;
    tokens[token->text] = {{"id", token->text},
                           {"ids", Json::array({token->id})},
                           {"tokens", Json::array({token->text})}};
  }
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", pair},
          {"special_tokens", tokens}};
}

}  // namespace lorikeet
