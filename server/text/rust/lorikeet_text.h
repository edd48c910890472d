// C interface of the Rust library `lorikeet_text`: tokenizers of Hugging Face, chat templates and
// constrained decoding.
//
// Used only by server/text/*.cc; everything else goes through the C++ headers of server/text.
// - Strings are UTF-8 bytes with a length, never NUL-terminated.
// - Functions returning bool: true = the output is set, false = *error is set (and nothing else).
// - LkBytes and LkIds that a call filled belong to the caller: free each once with its function.
// - No panic crosses this interface: one inside becomes an error that says so.
// - Every handle may be used by any number of threads at once; free it when no call is running.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  uint8_t* data;
  size_t size;
  size_t capacity;
} LkBytes;

typedef struct {
  uint32_t* data;
  size_t size;
  size_t capacity;
} LkIds;

void lk_bytes_free(LkBytes bytes);
void lk_ids_free(LkIds ids);

// ---- Tokenizer ---------------------------------------------------------------------------------

typedef struct LkTokenizer LkTokenizer;

// `json`: the content of a tokenizer.json. Truncation and padding that it may ask for are turned
// off: a prompt is never shortened in silence.
bool lk_tokenizer_create(const uint8_t* json, size_t json_size, LkTokenizer** out, LkBytes* error);
void lk_tokenizer_free(LkTokenizer* tokenizer);

// `add_special`: whether the tokenizer's own template (a BOS token, for most) is applied.
bool lk_tokenizer_encode(const LkTokenizer* tokenizer, const uint8_t* text, size_t text_size,
                         bool add_special, LkIds* ids, LkBytes* error);

// Unknown ids are skipped, as Hugging Face does.
bool lk_tokenizer_decode(const LkTokenizer* tokenizer, const uint32_t* ids, size_t ids_size,
                         bool skip_special, LkBytes* text, LkBytes* error);

// -1: no such token.
int64_t lk_tokenizer_token_to_id(const LkTokenizer* tokenizer, const uint8_t* token,
                                 size_t token_size);
// The token as it is written in the vocabulary. False without an error: no such id.
bool lk_tokenizer_id_to_token(const LkTokenizer* tokenizer, uint32_t id, LkBytes* token);

enum {
  LK_PIECE_EXISTS = 1,
  LK_PIECE_SPECIAL = 2,  // left out when decoding without special tokens
  LK_PIECE_BYTE = 4,     // a byte-fallback token: the piece is that one byte
};

// How the pieces of a token sequence become text.
typedef enum {
  // Pieces are raw bytes; their concatenation is read as UTF-8, each maximal invalid part becoming
  // U+FFFD.
  LK_JOIN_BYTES = 0,
  // Pieces are text, but for single bytes; a run of byte pieces that is not valid UTF-8 as a whole
  // becomes one U+FFFD a byte.
  LK_JOIN_BYTE_FALLBACK = 1,
} LkJoin;

// What each id contributes to the text, so that decoding needs no call per token.
typedef struct {
  LkBytes bytes;    // the pieces, one after the other
  LkIds begin;      // [count + 1] piece i is bytes[begin[i], begin[i + 1])
  LkBytes flags;    // [count] LK_PIECE_*
  LkJoin join;
  uint32_t strip_char;   // up to strip_max of this code point go from the text's start
  uint32_t strip_max;
  uint32_t longest;      // the most bytes of a text that become one token; 0: any number may
} LkPieces;

// count = highest id + 1. An error when the tokenizer's decoder is of a kind not listed in LkJoin.
bool lk_tokenizer_pieces(const LkTokenizer* tokenizer, LkPieces* out, LkBytes* error);
void lk_pieces_free(LkPieces pieces);

// ---- Chat template -----------------------------------------------------------------------------

typedef struct LkChatTemplate LkChatTemplate;

// Compiles `source` with the conventions of Transformers' apply_chat_template.
bool lk_chat_template_create(const uint8_t* source, size_t source_size, LkChatTemplate** out,
                             LkBytes* error);
void lk_chat_template_free(LkChatTemplate* chat_template);

// A variable of the template; an empty name: `json` is an object whose members are the variables.
// Later ones win. "messages" must be an array of objects.
typedef struct {
  const uint8_t* name;
  size_t name_size;
  const uint8_t* json;
  size_t json_size;
} LkVariable;

// `now_unix_s`: what strftime_now formats, in the local time zone.
bool lk_chat_template_render(const LkChatTemplate* chat_template, const LkVariable* variables,
                             size_t variables_size, int64_t now_unix_s, LkBytes* text,
                             LkBytes* error);

// ---- Constrained decoding ----------------------------------------------------------------------

typedef struct LkGrammars LkGrammars;
typedef struct LkMatcher LkMatcher;

// A model's tokens, ready for any number of grammars. Pieces as in LkPieces, [flags_size] of them;
// `vocab`, at least as many, is the width of masks. `end_ids` may come where a grammar may end.
bool lk_grammars_create(const uint8_t* bytes, const uint32_t* begin, const uint8_t* flags,
                        size_t flags_size, size_t vocab, const uint32_t* end_ids,
                        size_t end_ids_size, LkGrammars** out, LkBytes* error);
void lk_grammars_free(LkGrammars* grammars);

// `kind`: "json_schema", "json_object", "regex" or "lark". A matcher is for one thread at a time,
// and may outlive `grammars`.
bool lk_matcher_create(const LkGrammars* grammars, const uint8_t* kind, size_t kind_size,
                       const uint8_t* text, size_t text_size, LkMatcher** out, LkBytes* error);
LkMatcher* lk_matcher_clone(const LkMatcher* matcher);
void lk_matcher_free(LkMatcher* matcher);
// Bit t % 32 of allowed[t / 32]: token t may come next.
bool lk_matcher_mask(LkMatcher* matcher, uint32_t* allowed, size_t allowed_size, LkBytes* error);
bool lk_matcher_accept(LkMatcher* matcher, uint32_t token, LkBytes* error);
bool lk_matcher_stopped(const LkMatcher* matcher);

#ifdef __cplusplus
}
#endif
