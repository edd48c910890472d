#include "server/text/tokenizer.h"

#include <malloc.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/text/rust/lorikeet_text.h"
#include "server/text/rust_bytes.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

// What reading it took, a hundred times its bytes, goes back to the system and not to the heap.
constexpr size_t kLongTextBytes = 1 << 20;

std::string Utf8OfCodePoint(uint32_t c) {
  const auto byte = [](uint32_t bits) { return static_cast<char>(bits); };
  const auto tail = [&](int shift) { return byte(0x80 | ((c >> shift) & 0x3F)); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xC0 | (c >> 6)), tail(0)};
  if (c < 0x10000) return {byte(0xE0 | (c >> 12)), tail(6), tail(0)};
  return {byte(0xF0 | (c >> 18)), tail(12), tail(6), tail(0)};
}

TokenPieces Copy(const LkPieces& from) {
  TokenPieces pieces;
  pieces.bytes.assign(reinterpret_cast<const char*>(from.bytes.data), from.bytes.size);
  pieces.begin.assign(from.begin.data, from.begin.data + from.begin.size);
  pieces.flags.assign(from.flags.data, from.flags.data + from.flags.size);
  pieces.join =
      from.join == LK_JOIN_BYTES ? TokenPieces::Join::kBytes : TokenPieces::Join::kByteFallback;
  pieces.strip = Utf8OfCodePoint(from.strip_char);
  pieces.strip_max = from.strip_max;
  pieces.longest = from.longest;
  return pieces;
}

static_assert(TokenPieces::kExists == LK_PIECE_EXISTS);
static_assert(TokenPieces::kSpecial == LK_PIECE_SPECIAL);
static_assert(TokenPieces::kByte == LK_PIECE_BYTE);

}  // namespace

Tokenizer::~Tokenizer() = default;

void Tokenizer::Free::operator()(LkTokenizer* tokenizer) const { lk_tokenizer_free(tokenizer); }

absl::Status Tokenizer::Init(std::string_view tokenizer_json) {
  LkTokenizer* tokenizer = nullptr;
  LkBytes error;
  if (!lk_tokenizer_create(rust::Data(tokenizer_json), tokenizer_json.size(), &tokenizer, &error)) {
    return absl::InvalidArgumentError(rust::TakeString(error));
  }
  rust_.reset(tokenizer);
  LkPieces pieces;
  if (!lk_tokenizer_pieces(tokenizer, &pieces, &error)) {
    return absl::InvalidArgumentError(rust::TakeString(error));
  }
  pieces_ = Copy(pieces);
  lk_pieces_free(pieces);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromGguf(const GgufTokenizerSpec& spec) {
  LK_ASSIGN_OR_RETURN(const std::string json, GgufToTokenizerJson(spec));
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  LK_RETURN_IF_ERROR(tokenizer->Init(json));
  const auto named = [&](std::optional<int32_t> id) -> std::optional<NamedToken> {
    if (!id) return std::nullopt;
    return NamedToken{*id, spec.tokens[*id]};
  };
  tokenizer->named_ = {named(spec.bos_id), named(spec.eos_id), named(spec.unk_id),
                       named(spec.pad_id)};
  tokenizer->chat_template_.text = spec.chat_template;
  tokenizer->end_ids_ = GgufEndIds(spec);
  return tokenizer;
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       bool add_special) const {
  LK_RETURN_IF_ERROR(ValidateUtf8(text, "text"));
  LkIds ids;
  LkBytes error;
  if (!lk_tokenizer_encode(rust_.get(), rust::Data(text), text.size(), add_special, &ids, &error)) {
    return absl::InternalError(absl::StrCat("tokenizer: ", rust::TakeString(error)));
  }
  std::vector<int32_t> out(ids.data, ids.data + ids.size);
  lk_ids_free(ids);
  if (text.size() > kLongTextBytes) malloc_trim(0);
  return out;
}

absl::StatusOr<std::string> Tokenizer::Decode(std::span<const int32_t> ids,
                                              bool skip_special) const {
  const std::vector<uint32_t> unsigned_ids(ids.begin(), ids.end());
  LkBytes text;
  LkBytes error;
  if (!lk_tokenizer_decode(rust_.get(), unsigned_ids.data(), unsigned_ids.size(), skip_special,
                           &text, &error)) {
    return absl::InternalError(absl::StrCat("tokenizer: ", rust::TakeString(error)));
  }
  return rust::TakeString(text);
}

std::optional<int32_t> Tokenizer::TokenToId(std::string_view token) const {
  const int64_t id = lk_tokenizer_token_to_id(rust_.get(), rust::Data(token), token.size());
  if (id < 0) return std::nullopt;
  return static_cast<int32_t>(id);
}

std::optional<std::string> Tokenizer::IdToToken(int32_t id) const {
  LkBytes token;
  if (id < 0 || !lk_tokenizer_id_to_token(rust_.get(), id, &token)) return std::nullopt;
  return rust::TakeString(token);
}

}  // namespace lorikeet
