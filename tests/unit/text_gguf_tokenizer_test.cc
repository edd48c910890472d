// GGUF tokenizer metadata: what is read, what it becomes, what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "server/text/gguf_tokenizer.h"
#include "tests/unit/text_golden.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using testing::Json;
using testing::kTokenizerGoldens;
using testing::ReadJson;

absl::StatusOr<GgufTokenizerSpec> GoldenSpec(const std::string& name) {
  LK_ASSIGN_OR_RETURN(const GgufFile file, ReadGguf(kTokenizerGoldens / (name + ".gguf")));
  return ReadGgufTokenizerSpec(file.metadata);
}

// "llama": the merges come from the scores alone; Transformers made those in the directory.
TEST(GgufTokenizerTest, MakesTheMergesThatTransformersMakes) {
  for (const char* name : {"llama2", "gpt2", "qwen2"}) {
    const auto spec = GoldenSpec(name);
    ASSERT_TRUE(spec.ok()) << spec.status();
    const auto json = GgufToTokenizerJson(*spec);
    ASSERT_TRUE(json.ok()) << json.status();
    const Json made = Json::parse(*json)["model"];
    const Json want = ReadJson(kTokenizerGoldens / name / "tokenizer.json")["model"];
    ASSERT_EQ(made["merges"].size(), want["merges"].size()) << name;
    for (size_t i = 0; i < want["merges"].size(); ++i) {
      ASSERT_EQ(made["merges"][i], want["merges"][i]) << name << " merge " << i;
    }
  }
}

TEST(GgufTokenizerTest, ReadsTheKeys) {
  const auto llama3 = GoldenSpec("llama3");
  ASSERT_TRUE(llama3.ok()) << llama3.status();
  EXPECT_EQ(llama3->model, "gpt2");
  EXPECT_EQ(llama3->pre, "llama-bpe");
  EXPECT_EQ(llama3->tokens[*llama3->bos_id], "<|begin_of_text|>");
  EXPECT_EQ(llama3->types[*llama3->bos_id], GgufTokenizerSpec::kControl);
  EXPECT_FALSE(llama3->add_bos);
  EXPECT_FALSE(llama3->eot_id);
  const auto tekken = GoldenSpec("tekken");
  ASSERT_TRUE(tekken.ok()) << tekken.status();
  EXPECT_EQ(tekken->add_eos, true);
  const auto llama2 = GoldenSpec("llama2");
  ASSERT_TRUE(llama2.ok()) << llama2.status();
  EXPECT_EQ(llama2->scores.size(), llama2->tokens.size());
  EXPECT_TRUE(llama2->merges.empty());
}

TEST(GgufTokenizerTest, NamesTheKeyOfTheWrongType) {
  GgufMetadata metadata;
  EXPECT_EQ(ReadGgufTokenizerSpec(metadata).status().message(), "the GGUF file has no tokenizer");
  metadata["tokenizer.ggml.model"] = std::string("gpt2");
  metadata["tokenizer.ggml.tokens"] = std::vector<std::string>{"a", "b"};
  EXPECT_TRUE(ReadGgufTokenizerSpec(metadata).ok());
  const std::vector<std::pair<std::string, GgufValue>> wrong = {
      {"tokenizer.ggml.model", int64_t{1}},
      {"tokenizer.ggml.tokens", std::string("a")},
      {"tokenizer.ggml.token_type", std::vector<double>{1, 2}},
      {"tokenizer.ggml.scores", std::vector<int64_t>{1, 2}},
      {"tokenizer.ggml.merges", 1.0},
      {"tokenizer.ggml.bos_token_id", std::string("1")},
      {"tokenizer.ggml.eos_token_id", int64_t{1} << 40},
      {"tokenizer.ggml.add_bos_token", std::string("yes")},
      {"tokenizer.chat_template", int64_t{0}},
  };
  for (const auto& [key, value] : wrong) {
    GgufMetadata changed = metadata;
    changed[key] = value;
    const absl::Status status = ReadGgufTokenizerSpec(changed).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << key;
    EXPECT_THAT(std::string(status.message()), HasSubstr(key));
  }
}

GgufTokenizerSpec Small() {
  GgufTokenizerSpec spec;
  spec.model = "gpt2";
  spec.pre = "gpt-2";
  spec.tokens = {"a", "b", "ab", "<s>", "</s>"};
  spec.types = {1, 1, 1, 3, 3};
  spec.merges = {"a b"};
  spec.bos_id = 3;
  spec.eos_id = 4;
  return spec;
}

TEST(GgufTokenizerTest, RefusesWhatItCannotReproduceAndSaysWhat) {
  ASSERT_TRUE(Tokenizer::FromGguf(Small()).ok()) << Tokenizer::FromGguf(Small()).status();
  using Change = void (*)(GgufTokenizerSpec*);
  const std::vector<std::pair<Change, std::string>> cases = {
      {[](auto* s) { s->pre = "gpt-5"; }, "'gpt-5'"},
      {[](auto* s) { s->model = "bert"; }, "'bert'"},
      {[](auto* s) { s->model = "llama", s->merges.clear(); }, "neither scores nor merges"},
      {[](auto* s) { s->tokens.clear(), s->types.clear(); }, "empty"},
      {[](auto* s) { s->types.pop_back(); }, "token_type has 4 entries"},
      {[](auto* s) { s->scores = {1.0f}; }, "scores has 1 entries"},
      {[](auto* s) { s->bos_id = 5; }, "bos_token_id is 5"},
      {[](auto* s) { s->eos_id = -1; }, "eos_token_id is -1"},
      {[](auto* s) { s->eot_id = 1 << 30; }, "eot_token_id is"},
      {[](auto* s) { s->tokens[1] = "a"; }, "tokens 0 and 1 are the same: 'a'"},
      {[](auto* s) { s->tokens[1] = "\xC3"; }, "token 1 is not valid UTF-8 at byte 0"},
      {[](auto* s) { s->tokens[1] = std::string(5000, 'x'); }, "token 1 has 5000 bytes"},
      {[](auto* s) { s->merges = {"ab"}; }, "merge 0 is not two tokens"},
      {[](auto* s) { s->merges = {"a "}; }, "merge 0 is not two tokens"},
      {[](auto* s) { s->merges = {""}; }, "merge 0 is not two tokens"},
      {[](auto* s) { s->merges = {"a \xFF"}; }, "merge 0 is not valid UTF-8"},
      {[](auto* s) { s->merges = {"a x"}; }, "x"},
      {[](auto* s) { s->bos_id.reset(), s->add_bos = true; }, "bos_token_id is missing"},
      {[](auto* s) { s->eos_id.reset(), s->add_eos = true; }, "eos_token_id is missing"},
      {[](auto* s) {
         s->model = "llama", s->merges.clear(), s->scores = {0, 0, NAN, 0, 0};
       },
       "score 2 is not a number"},
  };
  for (const auto& [change, what] : cases) {
    GgufTokenizerSpec spec = Small();
    change(&spec);
    const absl::Status status = Tokenizer::FromGguf(spec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << what;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  }
}

TEST(GgufTokenizerTest, AddsBosByTheFilesWordElseByTheKindsHabit) {
  const auto first = [](GgufTokenizerSpec spec) {
    const auto tokenizer = Tokenizer::FromGguf(spec);
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    return (*tokenizer)->Encode("ab", true)->front();
  };
  GgufTokenizerSpec spec = Small();
  EXPECT_EQ(first(spec), 2);  // gpt-2: none
  spec.add_bos = true;
  EXPECT_EQ(first(spec), 3);
  spec.add_bos.reset();
  spec.pre = "llama-bpe";
  EXPECT_EQ(first(spec), 3);
  spec.add_bos = false;
  EXPECT_EQ(first(spec), 2);
  spec.add_bos.reset();
  spec.model = "llama";
  spec.add_space_prefix = false;
  EXPECT_EQ(first(spec), 3);
  spec.bos_id.reset();
  EXPECT_EQ(first(spec), 2);
}

TEST(GgufTokenizerTest, EndsAtEosAndEotOrAtKnownTurnEnds) {
  GgufTokenizerSpec spec = Small();
  EXPECT_THAT(GgufEndIds(spec), ::testing::ElementsAre(4));
  spec.tokens[0] = "<|im_end|>";  // a normal token: somebody's text, not the end of a turn
  EXPECT_THAT(GgufEndIds(spec), ::testing::ElementsAre(4));
  spec.types[0] = GgufTokenizerSpec::kControl;
  EXPECT_THAT(GgufEndIds(spec), ::testing::ElementsAre(0, 4));
  spec.eot_id = 3;
  EXPECT_THAT(GgufEndIds(spec), ::testing::ElementsAre(3, 4));
}

}  // namespace
}  // namespace lorikeet
