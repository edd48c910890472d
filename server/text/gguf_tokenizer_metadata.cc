// ReadGgufTokenizerSpec: the metadata keys of a GGUF file, checked for their types.
#include <cstdint>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/text/gguf_tokenizer.h"

namespace lorikeet {
namespace {

constexpr char kPrefix[] = "tokenizer.ggml.";

// The value of `key` moved to *out; no such key leaves *out alone.
template <typename T>
absl::Status ReadIfThere(const GgufMetadata& metadata, const std::string& key, T* out) {
  const auto it = metadata.find(key);
  if (it == metadata.end()) return absl::OkStatus();
  const T* value = std::get_if<T>(&it->second);
  if (value == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("GGUF ", key, " has an unexpected type"));
  }
  *out = *value;
  return absl::OkStatus();
}

absl::Status ReadId(const GgufMetadata& metadata, const char* name, std::optional<int32_t>* out) {
  constexpr int64_t kNone = -1;
  int64_t id = kNone;
  LK_RETURN_IF_ERROR(ReadIfThere(metadata, absl::StrCat(kPrefix, name), &id));
  if (id == kNone || id == std::numeric_limits<uint32_t>::max()) return absl::OkStatus();
  if (id < 0 || id > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("GGUF ", kPrefix, name, " is ", id));
  }
  *out = static_cast<int32_t>(id);
  return absl::OkStatus();
}

absl::Status ReadFlag(const GgufMetadata& metadata, const char* name, std::optional<bool>* out) {
  if (metadata.find(absl::StrCat(kPrefix, name)) == metadata.end()) return absl::OkStatus();
  int64_t flag = 0;
  LK_RETURN_IF_ERROR(ReadIfThere(metadata, absl::StrCat(kPrefix, name), &flag));
  *out = flag != 0;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GgufTokenizerSpec> ReadGgufTokenizerSpec(const GgufMetadata& metadata) {
  const auto read = [&](const char* name, auto* out) {
    return ReadIfThere(metadata, absl::StrCat(kPrefix, name), out);
  };
  GgufTokenizerSpec spec;
  LK_RETURN_IF_ERROR(read("model", &spec.model));
  LK_RETURN_IF_ERROR(read("pre", &spec.pre));
  LK_RETURN_IF_ERROR(read("tokens", &spec.tokens));
  LK_RETURN_IF_ERROR(read("merges", &spec.merges));
  if (spec.model.empty() || spec.tokens.empty()) {
    return absl::InvalidArgumentError("the GGUF file has no tokenizer");
  }
  std::vector<int64_t> types;
  std::vector<double> scores;
  LK_RETURN_IF_ERROR(read("token_type", &types));
  LK_RETURN_IF_ERROR(read("scores", &scores));
  spec.types.assign(types.begin(), types.end());
  spec.scores.assign(scores.begin(), scores.end());
  LK_RETURN_IF_ERROR(ReadId(metadata, "bos_token_id", &spec.bos_id));
  LK_RETURN_IF_ERROR(ReadId(metadata, "eos_token_id", &spec.eos_id));
  LK_RETURN_IF_ERROR(ReadId(metadata, "eot_token_id", &spec.eot_id));
  LK_RETURN_IF_ERROR(ReadId(metadata, "unknown_token_id", &spec.unk_id));
  LK_RETURN_IF_ERROR(ReadId(metadata, "padding_token_id", &spec.pad_id));
  LK_RETURN_IF_ERROR(ReadFlag(metadata, "add_bos_token", &spec.add_bos));
  LK_RETURN_IF_ERROR(ReadFlag(metadata, "add_eos_token", &spec.add_eos));
  LK_RETURN_IF_ERROR(ReadFlag(metadata, "add_space_prefix", &spec.add_space_prefix));
  LK_RETURN_IF_ERROR(ReadIfThere(metadata, "tokenizer.chat_template", &spec.chat_template));
  return spec;
}

}  // namespace lorikeet
