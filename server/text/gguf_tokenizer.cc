#include "server/text/gguf_tokenizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "server/text/tokenizer.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

using Json = nlohmann::ordered_json;
using Vocabulary = std::unordered_map<std::string_view, int32_t>;

constexpr size_t kMaxTokenBytes = 4096;
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

// Hugging Face's split patterns of the models that brought these names into use.
constexpr std::string_view kLlama3Words =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Words =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekkenWords =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// How a "gpt2" tokenizer prepares text, by tokenizer.ggml.pre.
struct PreTokenizer {
  std::string_view name;
  std::string_view words = {};  // pattern of one word; empty: GPT-2's own, built into ByteLevel
  bool single_digits = false;   // every digit is split off first
  bool nfc = false;
  bool whole_words = false;  // a word that is a token is taken as it is, whatever the merges say
  bool add_bos = false;      // where the file does not say
};

constexpr std::array kPreTokenizers = {
    PreTokenizer{.name = "default"},
    PreTokenizer{.name = "gpt-2"},
    PreTokenizer{.name = "smollm", .single_digits = true},
    PreTokenizer{.name = "llama-bpe", .words = kLlama3Words, .whole_words = true, .add_bos = true},
    PreTokenizer{.name = "llama3", .words = kLlama3Words, .whole_words = true, .add_bos = true},
    PreTokenizer{.name = "llama-v3", .words = kLlama3Words, .whole_words = true, .add_bos = true},
    PreTokenizer{.name = "smaug-bpe", .words = kLlama3Words},  // SmolLM3
    PreTokenizer{.name = "qwen2", .words = kQwen2Words, .nfc = true},
    PreTokenizer{.name = "deepseek-r1-qwen", .words = kQwen2Words, .nfc = true},
    PreTokenizer{.name = "tekken", .words = kTekkenWords, .whole_words = true, .add_bos = true},
};

absl::StatusOr<PreTokenizer> FindPreTokenizer(const std::string& name) {
  std::string known;
  for (const PreTokenizer& pre : kPreTokenizers) {
    if (pre.name == name || (name.empty() && pre.name == "default")) return pre;
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(pre.name));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("GGUF pre-tokenizer '", name, "' is not supported; supported are ", known));
}

absl::Status CheckId(const GgufTokenizerSpec& spec, std::optional<int32_t> id, const char* name) {
  if (!id || (*id >= 0 && *id < static_cast<int64_t>(spec.tokens.size()))) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "GGUF ", name, " is ", *id, ", the vocabulary has ", spec.tokens.size(), " tokens"));
}

absl::Status CheckLength(const GgufTokenizerSpec& spec, size_t length, const char* name) {
  if (length == 0 || length == spec.tokens.size()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("GGUF ", name, " has ", length,
                                                 " entries, the vocabulary has ",
                                                 spec.tokens.size(), " tokens"));
}

absl::StatusOr<Vocabulary> CheckedVocabulary(const GgufTokenizerSpec& spec) {
  if (spec.tokens.empty()) return absl::InvalidArgumentError("GGUF vocabulary is empty");
  LK_RETURN_IF_ERROR(CheckLength(spec, spec.types.size(), "token_type"));
  LK_RETURN_IF_ERROR(CheckLength(spec, spec.scores.size(), "scores"));
  LK_RETURN_IF_ERROR(CheckId(spec, spec.bos_id, "bos_token_id"));
  LK_RETURN_IF_ERROR(CheckId(spec, spec.eos_id, "eos_token_id"));
  LK_RETURN_IF_ERROR(CheckId(spec, spec.eot_id, "eot_token_id"));
  LK_RETURN_IF_ERROR(CheckId(spec, spec.unk_id, "unknown_token_id"));
  LK_RETURN_IF_ERROR(CheckId(spec, spec.pad_id, "padding_token_id"));
  Vocabulary vocabulary;
  vocabulary.reserve(spec.tokens.size());
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    const std::string& token = spec.tokens[id];
    LK_RETURN_IF_ERROR(ValidateUtf8(token, absl::StrCat("GGUF token ", id)));
    if (token.size() > kMaxTokenBytes) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF token ", id, " has ", token.size(),
                                                     " bytes, more than ", kMaxTokenBytes));
    }
    const auto [it, inserted] = vocabulary.emplace(token, static_cast<int32_t>(id));
    if (!inserted) {
      return absl::InvalidArgumentError(
          absl::StrCat("GGUF tokens ", it->second, " and ", id, " are the same: '", token, "'"));
    }
  }
  return vocabulary;
}

// Control and unknown tokens are Hugging Face's special tokens, user-defined ones its plain added
// tokens; an empty one can match nothing.
Json AddedTokens(const GgufTokenizerSpec& spec) {
  Json added = Json::array();
  for (size_t id = 0; id < spec.types.size(); ++id) {
    const int32_t type = spec.types[id];
    const bool special = type == GgufTokenizerSpec::kControl || type == GgufTokenizerSpec::kUnknown;
    if (!special && type != GgufTokenizerSpec::kUserDefined) continue;
    if (spec.tokens[id].empty()) continue;
    added.push_back({{"id", id},
                     {"content", spec.tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", special}});
  }
  return added;
}

absl::StatusOr<Json> MergePairs(const GgufTokenizerSpec& spec) {
  Json pairs = Json::array();
  for (size_t i = 0; i < spec.merges.size(); ++i) {
    const std::string& merge = spec.merges[i];
    LK_RETURN_IF_ERROR(ValidateUtf8(merge, absl::StrCat("GGUF merge ", i)));
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos || space + 1 == merge.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("GGUF merge ", i, " is not two tokens and a space: '", merge, "'"));
    }
    pairs.push_back(Json::array({merge.substr(0, space), merge.substr(space + 1)}));
  }
  return pairs;
}

size_t CharacterCount(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

// SentencePiece joins the two neighbours whose union has the highest score; as a list of merges:
// every way to cut a token into two tokens, by falling score of the whole (the order among equals
// is that of Transformers' conversion).
absl::StatusOr<Json> MergesFromScores(const GgufTokenizerSpec& spec, const Vocabulary& vocabulary) {
  struct Merge {
    float score;
    size_t left_chars, right_chars;
    std::string_view left, right;
  };
  std::vector<Merge> merges;
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    const std::string_view token = spec.tokens[id];
    if (std::isnan(spec.scores[id])) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF score ", id, " is not a number"));
    }
    std::vector<std::tuple<int32_t, int32_t, size_t>> cuts;  // ids of both parts, where
    for (size_t at = 1; at < token.size(); ++at) {
      if ((token[at] & 0xC0) == 0x80) continue;  // inside a character
      const auto left = vocabulary.find(token.substr(0, at));
      if (left == vocabulary.end()) continue;
      const auto right = vocabulary.find(token.substr(at));
      if (right != vocabulary.end()) cuts.emplace_back(left->second, right->second, at);
    }
    std::sort(cuts.begin(), cuts.end());
    for (const auto& [left_id, right_id, at] : cuts) {
      const std::string_view left = token.substr(0, at);
      const std::string_view right = token.substr(at);
      merges.push_back({spec.scores[id], CharacterCount(left), CharacterCount(right), left, right});
    }
  }
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tie(a.score, a.left_chars, a.right_chars) >
           std::tie(b.score, b.left_chars, b.right_chars);
  });
  Json pairs = Json::array();
  for (const Merge& merge : merges) {
    pairs.push_back(Json::array({std::string(merge.left), std::string(merge.right)}));
  }
  return pairs;
}

// The template that puts `bos` and `eos` around a text; null where there is nothing to add.
Json SpecialTokenTemplate(const std::optional<NamedToken>& bos,
                          const std::optional<NamedToken>& eos) {
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

absl::StatusOr<Json> PostProcessor(const GgufTokenizerSpec& spec, bool add_bos_by_default) {
  const bool add_bos = spec.add_bos.value_or(add_bos_by_default && spec.bos_id);
  const bool add_eos = spec.add_eos.value_or(false);
  if (add_bos && !spec.bos_id) {
    return absl::InvalidArgumentError("GGUF add_bos_token is set, bos_token_id is missing");
  }
  if (add_eos && !spec.eos_id) {
    return absl::InvalidArgumentError("GGUF add_eos_token is set, eos_token_id is missing");
  }
  const auto named = [&](bool add, std::optional<int32_t> id) -> std::optional<NamedToken> {
    if (!add) return std::nullopt;
    return NamedToken{*id, spec.tokens[*id]};
  };
  return SpecialTokenTemplate(named(add_bos, spec.bos_id), named(add_eos, spec.eos_id));
}

Json Model(const GgufTokenizerSpec& spec, Json merges) {
  Json vocabulary = Json::object();
  // An ordered object looks its keys up one by one; filling its vector directly keeps this linear.
  auto& entries = vocabulary.get_ref<Json::object_t&>();
  entries.reserve(spec.tokens.size());
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    entries.Container::emplace_back(spec.tokens[id], id);
  }
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false},
          {"vocab", std::move(vocabulary)},
          {"merges", std::move(merges)}};
}

Json ByteLevel(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

absl::StatusOr<Json> ByteLevelBpe(const GgufTokenizerSpec& spec) {
  LK_ASSIGN_OR_RETURN(const PreTokenizer pre, FindPreTokenizer(spec.pre));
  LK_ASSIGN_OR_RETURN(Json merges, MergePairs(spec));
  LK_ASSIGN_OR_RETURN(Json post_processor, PostProcessor(spec, pre.add_bos));
  Json steps = Json::array();
  if (pre.single_digits) steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
  if (!pre.words.empty()) {
    steps.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", std::string(pre.words)}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
  }
  steps.push_back(ByteLevel(pre.words.empty()));
  Json model = Model(spec, std::move(merges));
  model["ignore_merges"] = pre.whole_words;
  return Json{{"normalizer", pre.nfc ? Json{{"type", "NFC"}} : Json(nullptr)},
              {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}}},
              {"post_processor", std::move(post_processor)},
              {"decoder", ByteLevel(true)},
              {"model", std::move(model)}};
}

absl::StatusOr<Json> SentencePieceBpe(const GgufTokenizerSpec& spec, const Vocabulary& vocabulary) {
  Json merges;
  if (!spec.merges.empty()) {
    LK_ASSIGN_OR_RETURN(merges, MergePairs(spec));
  } else if (!spec.scores.empty()) {
    LK_ASSIGN_OR_RETURN(merges, MergesFromScores(spec, vocabulary));
  } else {
    return absl::InvalidArgumentError("GGUF tokenizer 'llama' has neither scores nor merges");
  }
  LK_ASSIGN_OR_RETURN(Json post_processor, PostProcessor(spec, /*add_bos_by_default=*/true));
  const bool space_prefix = spec.add_space_prefix.value_or(true);
  Json normalizers = Json::array();
  if (space_prefix) {
    normalizers.push_back({{"type", "Prepend"}, {"prepend", std::string(kSpaceMark)}});
  }
  normalizers.push_back(
      {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", std::string(kSpaceMark)}});
  Json decoders = Json::array({
      {{"type", "Replace"}, {"pattern", {{"String", std::string(kSpaceMark)}}}, {"content", " "}},
      {{"type", "ByteFallback"}},
      {{"type", "Fuse"}},
  });
  if (space_prefix) {
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  Json model = Model(spec, std::move(merges));
  model["byte_fallback"] = true;
  model["fuse_unk"] = true;
  if (spec.unk_id) model["unk_token"] = spec.tokens[*spec.unk_id];
  return Json{{"normalizer", {{"type", "Sequence"}, {"normalizers", std::move(normalizers)}}},
              {"pre_tokenizer", nullptr},
              {"post_processor", std::move(post_processor)},
              {"decoder", {{"type", "Sequence"}, {"decoders", std::move(decoders)}}},
              {"model", std::move(model)}};
}

}  // namespace

absl::StatusOr<std::string> GgufToTokenizerJson(const GgufTokenizerSpec& spec) {
  LK_ASSIGN_OR_RETURN(const Vocabulary vocabulary, CheckedVocabulary(spec));
  absl::StatusOr<Json> json = spec.model == "gpt2" ? ByteLevelBpe(spec)
                              : spec.model == "llama"
                                  ? SentencePieceBpe(spec, vocabulary)
                                  : absl::InvalidArgumentError(absl::StrCat(
                                        "GGUF tokenizer model '", spec.model,
                                        "' is not supported; supported are gpt2 and llama"));
  LK_RETURN_IF_ERROR(json.status());
  (*json)["version"] = "1.0";
  (*json)["truncation"] = nullptr;
  (*json)["padding"] = nullptr;
  (*json)["added_tokens"] = AddedTokens(spec);
  return json->dump();
}

std::vector<int32_t> GgufEndIds(const GgufTokenizerSpec& spec) {
  std::vector<int32_t> ids;
  if (spec.eos_id) ids.push_back(*spec.eos_id);
  if (spec.eot_id) {
    ids.push_back(*spec.eot_id);
  } else {
    constexpr std::string_view kTurnEnds[] = {"<|eot_id|>", "<|im_end|>", "<|end|>",
                                              "<end_of_turn>"};
    for (size_t id = 0; id < spec.types.size(); ++id) {
      if (spec.types[id] == GgufTokenizerSpec::kControl &&
          std::count(std::begin(kTurnEnds), std::end(kTurnEnds), spec.tokens[id]) > 0) {
        ids.push_back(static_cast<int32_t>(id));
      }
    }
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

}  // namespace lorikeet
