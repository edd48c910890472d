// Tokenizers against Hugging Face's own results, from directories and from GGUF files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "server/text/detokenizer.h"
#include "server/text/utf8.h"
#include "tests/unit/text_golden.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using testing::GoldenTokenizer;
using testing::Json;
using testing::kTokenizerGoldens;
using testing::ReadJson;
using Ids = std::vector<int32_t>;

struct Case {
  const char* name;
  const char* source;
};

class GoldenTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    auto tokenizer = GoldenTokenizer(GetParam().name, GetParam().source);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    strings_ = ReadJson(kTokenizerGoldens / "strings.json").get<std::vector<std::string>>();
    golden_ = ReadJson(kTokenizerGoldens / absl::StrCat("ids_", GetParam().name, ".json"));
    ASSERT_GE(strings_.size(), 1000u);
    ASSERT_EQ(golden_["ids"].size(), strings_.size());
  }

  // The stream's texts joined; each is checked to be whole characters.
  std::string Stream(std::span<const int32_t> ids, bool skip_special, Detokenizer::Start start) {
    Detokenizer detokenizer(*tokenizer_, skip_special, start);
    std::string all;
    for (size_t i = 0; i <= ids.size(); ++i) {
      std::string text;
      if (i < ids.size()) {
        detokenizer.Append(ids[i], &text);
      } else {
        detokenizer.Finish(&text);
      }
      EXPECT_TRUE(ValidateUtf8(text, "text").ok()) << "at token " << i << ": " << Json(ids).dump();
      all += text;
    }
    return all;
  }

  std::string Decode(std::span<const int32_t> ids, bool skip_special) {
    auto text = tokenizer_->Decode(ids, skip_special);
    EXPECT_TRUE(text.ok()) << text.status();
    return text.value_or("");
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<std::string> strings_;
  Json golden_;
};

TEST_P(GoldenTest, EncodesAsHuggingFace) {
  int wrong = 0;
  for (size_t i = 0; i < strings_.size() && wrong < 5; ++i) {
    const Ids want = golden_["ids"][i].get<Ids>();
    const auto got = tokenizer_->Encode(strings_[i], /*add_special=*/false);
    ASSERT_TRUE(got.ok()) << got.status();
    wrong += *got != want;
    EXPECT_EQ(*got, want) << "string " << i << ": " << Json(strings_[i]).dump();
  }
}

TEST_P(GoldenTest, AddsTheSpecialTokensThatHuggingFaceAdds) {
  for (size_t i = 0; i < strings_.size(); ++i) {
    Ids want = golden_["prefix"].get<Ids>();
    for (int32_t id : golden_["ids"][i]) want.push_back(id);
    for (int32_t id : golden_["suffix"]) want.push_back(id);
    const auto got = tokenizer_->Encode(strings_[i], /*add_special=*/true);
    ASSERT_TRUE(got.ok()) << got.status();
    ASSERT_EQ(*got, want) << "string " << i << ": " << Json(strings_[i]).dump();
  }
}

TEST_P(GoldenTest, NoTokenStandsForMoreBytesThanTheLongest) {
  const uint32_t longest = tokenizer_->pieces().longest;
  ASSERT_GT(longest, 0u);
  uint64_t most = 0;  // a string has had to a token
  for (size_t i = 0; i < strings_.size(); ++i) {
    const size_t tokens = golden_["ids"][i].size();
    ASSERT_LE(strings_[i].size(), tokens * longest) << Json(strings_[i]).dump();
    if (tokens > 0) most = std::max(most, strings_[i].size() / tokens);
  }
  EXPECT_GE(4 * most, longest / 4) << "the bound says little";
}

TEST_P(GoldenTest, DecodesAndStreamsAsHuggingFaceDecodes) {
  for (const Json& decoding : golden_["decodings"]) {
    const Ids ids = decoding[0].get<Ids>();
    for (const bool skip : {false, true}) {
      const std::string want = decoding[skip ? 2 : 1];
      ASSERT_EQ(Decode(ids, skip), want) << decoding[0].dump() << " skip_special " << skip;
      ASSERT_EQ(Stream(ids, skip, Detokenizer::Start::kText), want)
          << decoding[0].dump() << " skip_special " << skip;
    }
  }
}

TEST_P(GoldenTest, StreamsEveryStringAsItsWholeDecoding) {
  for (const Json& golden : golden_["ids"]) {
    const Ids ids = golden.get<Ids>();
    for (const bool skip : {false, true}) {
      ASSERT_EQ(Stream(ids, skip, Detokenizer::Start::kText), Decode(ids, skip)) << golden.dump();
    }
  }
}

// A prompt's text and the stream that continues it are together the text of all tokens, wherever
// the cut is not inside a character or a run of byte tokens.
TEST_P(GoldenTest, AStreamContinuesThePromptsText) {
  const TokenPieces& pieces = tokenizer_->pieces();
  int cuts = 0;
  for (const Json& golden : golden_["ids"]) {
    const Ids ids = golden.get<Ids>();
    if (ids.size() < 2) continue;
    const size_t cut = ids.size() / 2;
    const std::span<const int32_t> all(ids), prompt = all.first(cut), rest = all.subspan(cut);
    const std::string before = Decode(prompt, false);
    if (before.empty() || before.ends_with("\xEF\xBF\xBD")) continue;
    if (pieces.has(prompt.back(), TokenPieces::kByte)) continue;
    ++cuts;
    ASSERT_EQ(before + Stream(rest, false, Detokenizer::Start::kContinuation), Decode(ids, false))
        << golden.dump() << " cut at " << cut;
  }
  EXPECT_GT(cuts, 500);
}

TEST_P(GoldenTest, EveryTokenIsFoundByItsName) {
  for (int32_t id = 0; id < tokenizer_->vocab_size(); ++id) {
    const auto token = tokenizer_->IdToToken(id);
    ASSERT_TRUE(token) << id;
    ASSERT_EQ(tokenizer_->TokenToId(*token), id) << *token;
  }
  EXPECT_FALSE(tokenizer_->IdToToken(tokenizer_->vocab_size()));
  EXPECT_FALSE(tokenizer_->IdToToken(-1));
  EXPECT_FALSE(tokenizer_->TokenToId("no such token, surely"));
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest,
                         ::testing::Values(Case{"smollm2", "gguf"}, Case{"gpt2", "directory"},
                                           Case{"gpt2", "gguf"}, Case{"smollm", "directory"},
                                           Case{"smollm", "gguf"}, Case{"llama3", "directory"},
                                           Case{"llama3", "gguf"}, Case{"qwen2", "directory"},
                                           Case{"qwen2", "gguf"}, Case{"tekken", "directory"},
                                           Case{"tekken", "gguf"}, Case{"llama2", "directory"},
                                           Case{"llama2", "gguf"}),
                         [](const auto& info) {
                           return absl::StrCat(info.param.name, "_", info.param.source);
                         });

TEST(TokenizerTest, KnowsTheNamedTokensAndTheEnds) {
  for (const char* source : {"directory", "gguf"}) {
    const auto llama3 = GoldenTokenizer("llama3", source);
    ASSERT_TRUE(llama3.ok()) << llama3.status();
    const Tokenizer& tokenizer = **llama3;
    EXPECT_EQ(tokenizer.named().bos->text, "<|begin_of_text|>") << source;
    EXPECT_EQ(tokenizer.named().eos->text, "<|end_of_text|>") << source;
    EXPECT_FALSE(tokenizer.named().pad) << source;
    // The directory lists both in generation_config.json; the GGUF file names EOS alone, and the
    // end of a turn is known by its name.
    EXPECT_THAT(tokenizer.end_ids(), ElementsAre(*tokenizer.TokenToId("<|end_of_text|>"),
                                                 *tokenizer.TokenToId("<|eot_id|>")))
        << source;
    EXPECT_TRUE(tokenizer.is_special(tokenizer.named().bos->id));
    EXPECT_FALSE(tokenizer.is_special(0));
    EXPECT_FALSE(tokenizer.is_special(-1));
    EXPECT_FALSE(tokenizer.is_special(tokenizer.vocab_size()));
  }
  const auto qwen2 = GoldenTokenizer("qwen2", "gguf");
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_FALSE((*qwen2)->is_special(*(*qwen2)->TokenToId("<tool_call>")));
}

TEST(TokenizerTest, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = GoldenTokenizer("gpt2", "directory");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto ids = (*tokenizer)->Encode("abc\xC3(", false);
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ids.status().message(), "text is not valid UTF-8 at byte 3");
}

TEST(TokenizerTest, ServesManyThreadsAtOnce) {
  const auto tokenizer = GoldenTokenizer("llama2", "gguf");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto strings = ReadJson(kTokenizerGoldens / "strings.json").get<std::vector<std::string>>();
  const auto want = ReadJson(kTokenizerGoldens / "ids_llama2.json")["ids"].get<std::vector<Ids>>();
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < strings.size(); ++i) {
        const size_t at = (i + t * 97) % strings.size();
        const auto ids = (*tokenizer)->Encode(strings[at], false);
        wrong += !ids.ok() || *ids != want[at];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

class DirectoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "tokenizerXXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void Write(const std::string& name, std::string_view content) {
    std::filesystem::create_directories((directory_ / name).parent_path());
    std::ofstream(directory_ / name, std::ios::binary) << content;
  }
  void CopyGolden(const std::string& name) {
    std::filesystem::copy_file(kTokenizerGoldens / "gpt2" / name, directory_ / name);
  }

  std::filesystem::path directory_;
};

TEST_F(DirectoryTest, NamesTheFileThatIsMissingOrWrong) {
  EXPECT_EQ(Tokenizer::FromDirectory(directory_).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Tokenizer::FromDirectory(directory_).status().message()),
              ::testing::HasSubstr("tokenizer.json does not exist"));
  for (const char* bad : {"", "{", "[]", "{}", "{\"model\": 1}", "\xff"}) {
    Write("tokenizer.json", bad);
    const absl::Status status = Tokenizer::FromDirectory(directory_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("tokenizer.json")) << bad;
  }
  std::filesystem::remove(directory_ / "tokenizer.json");
  CopyGolden("tokenizer.json");
  for (const char* name : {"tokenizer_config.json", "generation_config.json", "config.json",
                           "special_tokens_map.json", "chat_template.json"}) {
    Write(name, "{\"eos_token\": ");
    const absl::Status status = Tokenizer::FromDirectory(directory_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(name));
    std::filesystem::remove(directory_ / name);
  }
}

TEST_F(DirectoryTest, RefusesADecoderItCannotStream) {
  Json json = ReadJson(kTokenizerGoldens / "gpt2" / "tokenizer.json");
  json["decoder"] = {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}};
  Write("tokenizer.json", json.dump());
  const absl::Status status = Tokenizer::FromDirectory(directory_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("WordPiece"));
}

TEST_F(DirectoryTest, ATokenMayStandForAnyLengthWhereTextIsDropped) {
  const Json whole = ReadJson(kTokenizerGoldens / "gpt2" / "tokenizer.json");
  const auto longest = [&](const Json& json) {
    Write("tokenizer.json", json.dump());
    const auto tokenizer = Tokenizer::FromDirectory(directory_);
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    return tokenizer.ok() ? (*tokenizer)->pieces().longest : 0;
  };
  const uint32_t plain = longest(whole);
  ASSERT_GT(plain, 0u);
  Json json = whole;
  json["normalizer"] = {{"type", "NFC"}};
  EXPECT_EQ(longest(json), 4 * plain);
  json["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "aa"}}}, {"content", "b"}};
  EXPECT_EQ(longest(json), 0u);
  json["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}};
  EXPECT_EQ(longest(json), 0u);
  json = whole;
  json["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers", {{{"type", "WhitespaceSplit"}}, whole["pre_tokenizer"]}}};
  EXPECT_EQ(longest(json), 0u);
  json = whole;
  json["added_tokens"][0]["rstrip"] = true;
  EXPECT_EQ(longest(json), 0u);
}

TEST_F(DirectoryTest, IgnoresTruncationAndPadding) {
  Json json = ReadJson(kTokenizerGoldens / "gpt2" / "tokenizer.json");
  json["truncation"] = {
      {"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}};
  json["padding"] = {{"strategy", {{"Fixed", 64}}},
                     {"direction", "Right"},
                     {"pad_to_multiple_of", nullptr},
                     {"pad_id", 0},
                     {"pad_type_id", 0},
                     {"pad_token", "!"}};
  Write("tokenizer.json", json.dump());
  const auto changed = Tokenizer::FromDirectory(directory_);
  ASSERT_TRUE(changed.ok()) << changed.status();
  const auto plain = GoldenTokenizer("gpt2", "directory");
  const std::string text = "the server keeps one model and many adapters";
  EXPECT_EQ(*(*changed)->Encode(text, true), *(*plain)->Encode(text, true));
}

TEST_F(DirectoryTest, FindsEndTokensAndTemplatesInEveryFileThatMayHaveThem) {
  CopyGolden("tokenizer.json");
  Write("config.json", R"({"eos_token_id": [5, 6]})");
  Write("special_tokens_map.json", R"({"eos_token": {"content": "<|endoftext|>"}})");
  Write("tokenizer_config.json",
        R"({"chat_template": [{"name": "default", "template": "one"},
                              {"name": "tool_use", "template": "two"}]})");
  auto tokenizer = Tokenizer::FromDirectory(directory_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const int32_t eos = *(*tokenizer)->TokenToId("<|endoftext|>");
  EXPECT_THAT((*tokenizer)->end_ids(), ElementsAre(5, 6, eos));
  EXPECT_EQ((*tokenizer)->chat_template().text, "one");
  EXPECT_EQ((*tokenizer)->chat_template().with_tools, "two");

  Write("generation_config.json", R"({"eos_token_id": 7})");
  Write("chat_template.json", R"({"chat_template": "three"})");
  tokenizer = Tokenizer::FromDirectory(directory_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->end_ids(), ElementsAre(7, eos));
  EXPECT_EQ((*tokenizer)->chat_template().text, "three");

  Write("chat_template.jinja", "four");
  Write("additional_chat_templates/tool_use.jinja", "five");
  tokenizer = Tokenizer::FromDirectory(directory_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->chat_template().text, "four");
  EXPECT_EQ((*tokenizer)->chat_template().with_tools, "five");
}

}  // namespace
}  // namespace lorikeet
