// The tokenizer that a GGUF file carries in its metadata, turned into a Hugging Face
// tokenizer.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor/gguf.h"

namespace lorikeet {

// The keys tokenizer.ggml.* and tokenizer.chat_template, as the file has them.
struct GgufTokenizerSpec {
  // tokenizer.ggml.token_type (the GGUF specification's numbers).
  enum Type : int32_t { kNormal = 1, kUnknown, kControl, kUserDefined, kUnused, kByte };

  std::string model;                // "gpt2": byte-level BPE; "llama": SentencePiece BPE
  std::string pre;                  // how "gpt2" splits text into words
  std::vector<std::string> tokens;  // [vocab]
  std::vector<int32_t> types;       // [vocab] or empty: all normal
  std::vector<float> scores;        // [vocab] or empty; "llama" without merges needs them
  std::vector<std::string> merges;  // "left right", highest priority first
  std::optional<int32_t> bos_id, eos_id, eot_id, unk_id, pad_id;
  // Absent: the default of the model and pre-tokenizer, as in llama.cpp.
  std::optional<bool> add_bos, add_eos, add_space_prefix;
  std::string chat_template;  // empty: none
};

// INVALID_ARGUMENT names a key that is missing or of the wrong type.
absl::StatusOr<GgufTokenizerSpec> ReadGgufTokenizerSpec(const GgufMetadata& metadata);

// Tokens that end a generation, sorted: EOS and EOT; where the file names no EOT, the control
// tokens that chat models are known to end a turn with. REQUIRES: GgufToTokenizerJson accepted
// `spec`.
std::vector<int32_t> GgufEndIds(const GgufTokenizerSpec& spec);

// The content of a tokenizer.json that encodes as the original Hugging Face tokenizer did.
// INVALID_ARGUMENT names what is not supported (model, pre) or inconsistent (lengths, duplicate or
// non-UTF-8 tokens, ids beyond the vocabulary).
absl::StatusOr<std::string> GgufToTokenizerJson(const GgufTokenizerSpec& spec);

}  // namespace lorikeet
