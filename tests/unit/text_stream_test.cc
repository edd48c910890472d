// UTF-8 at the door, UTF-8 from bytes in pieces, and stop strings over text in pieces.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "nlohmann/json.hpp"
#include "server/text/stop_matcher.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAreArray;

constexpr char kReplacement[] = "\xEF\xBF\xBD";

std::string Shown(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', true, nlohmann::json::error_handler_t::ignore);
}

TEST(ValidateUtf8Test, AcceptsEveryCodePointAndNothingElse) {
  for (uint32_t c = 0; c <= 0x10FFFF; c += c < 0x11000 ? 1 : 97) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    const int size = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    const uint32_t lead = size == 1 ? 0 : size == 2 ? 0xC0 : size == 3 ? 0xE0 : 0xF0;
    std::string text(1, static_cast<char>(lead | (c >> (6 * (size - 1)))));
    for (int i = size - 2; i >= 0; --i) {
      text.push_back(static_cast<char>(0x80 | ((c >> (6 * i)) & 0x3F)));
    }
    ASSERT_TRUE(ValidateUtf8(text, "text").ok()) << std::hex << c;
    for (size_t cut = 1; cut < text.size(); ++cut) {
      ASSERT_FALSE(ValidateUtf8(text.substr(0, cut), "text").ok()) << std::hex << c;
      ASSERT_FALSE(ValidateUtf8(text.substr(cut), "text").ok()) << std::hex << c;
    }
  }
}

TEST(ValidateUtf8Test, NamesTheOffsetOfTheFirstInvalidByte) {
  const std::vector<std::pair<std::string, int>> cases = {
      {"\x80", 0},
      {"a\xFF", 1},
      {"ab\xC0\x80", 2},  // overlong NUL
      {"\xE0\x80\x80", 0},
      {"\xED\xA0\x80", 0},      // a surrogate
      {"\xF4\x90\x80\x80", 0},  // beyond U+10FFFF
      {"\xF5\x80\x80\x80", 0},
      {"\xC3\xA9\xC3", 2},
      {"\xF0\x9F\x98\x80\x80", 4},
      {"\xE2\x82", 0},
      {"ok\xE2\x82x", 2},
      {"\xF0\x9F\x98", 0},
  };
  for (const auto& [text, offset] : cases) {
    const absl::Status status = ValidateUtf8(text, "prompt");
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "prompt is not valid UTF-8 at byte " + std::to_string(offset));
  }
  EXPECT_TRUE(ValidateUtf8("", "prompt").ok());
  EXPECT_TRUE(ValidateUtf8(std::string("a\0b", 3), "prompt").ok());
}

std::string Repair(const std::string& bytes, std::mt19937* random) {
  Utf8Repairer repairer;
  std::string all;
  for (size_t at = 0; at < bytes.size();) {
    const size_t size = random ? (*random)() % 4 : bytes.size();
    std::string text;
    repairer.Append(std::string_view(bytes).substr(at, size), &text);
    EXPECT_TRUE(ValidateUtf8(text, "text").ok()) << Shown(bytes);
    all += text;
    at += size;
  }
  repairer.Finish(&all);
  return all;
}

// The examples of the Unicode standard, section 3.9 (tables 3-8 to 3-11).
TEST(Utf8RepairerTest, ReplacesMaximalInvalidParts) {
  const std::string r = kReplacement;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82"
       "A",
       r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF"
       "A",
       r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF"
       "A\x80\xBF"
       "B",
       r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
       "A",
       r + r + r + r + "A"},
      {"\xF0\x9F\x98", r},
      {"a\xC3", "a" + r},
  };
  for (const auto& [bytes, text] : cases) EXPECT_EQ(Repair(bytes, nullptr), text) << Shown(text);
}

TEST(Utf8RepairerTest, TheCutsBetweenPiecesDoNotMatter) {
  std::mt19937 random(3);
  const std::string alphabet = "ab\x80\x9F\xA0\xBF\xC0\xC3\xE0\xE2\xED\xF0\xF4\xFF";
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes;
    for (int i = random() % 12; i > 0; --i) bytes += alphabet[random() % alphabet.size()];
    ASSERT_EQ(Repair(bytes, &random), Repair(bytes, nullptr)) << Shown(bytes);
  }
}

struct Stopped {
  std::string text;
  std::string stop;  // empty: none
  bool operator==(const Stopped&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Stopped& stopped) {
  return out << "text " << stopped.text << " stop " << stopped.stop;
}

// The definition, read off the whole text: the first end, and the longest that ends there.
Stopped StopWhole(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string longest;
    for (const std::string& stop : stops) {
      const bool here = std::string_view(text).substr(0, end).ends_with(stop);
      if (here && stop.size() > longest.size()) longest = stop;
    }
    if (!longest.empty()) return {text.substr(0, include ? end : end - longest.size()), longest};
  }
  return {text, ""};
}

TEST(StopMatcherTest, EqualsTheDefinitionHoweverTheTextIsCut) {
  std::mt19937 random(5);
  const auto word = [&](int least, int most) {
    std::string word;
    for (int i = least + random() % (most - least + 1); i > 0; --i) word += "abc"[random() % 3];
    return word;
  };
  int found = 0;
  for (int round = 0; round < 50'000; ++round) {
    const std::string text = word(0, 24);
    std::vector<std::string> stops;
    for (int i = random() % 4; i > 0; --i) stops.push_back(word(1, 6));
    const bool include = random() % 2;
    auto matcher = StopMatcher::Create(stops, include);
    ASSERT_TRUE(matcher.ok()) << matcher.status();
    Stopped got;
    for (size_t at = 0; at < text.size();) {
      const size_t size = random() % 5;
      const bool was_stopped = matcher->stopped();
      const size_t before = got.text.size();
      matcher->Push(std::string_view(text).substr(at, size), &got.text);
      ASSERT_FALSE(was_stopped && got.text.size() != before) << text;
      at += size;
    }
    matcher->Finish(&got.text);
    if (matcher->matched() != nullptr) got.stop = *matcher->matched();
    found += matcher->stopped();
    ASSERT_EQ(got, StopWhole(text, stops, include))
        << text << " stops " << nlohmann::json(stops).dump() << " include " << include;
  }
  EXPECT_GT(found, 10'000);
}

// Text goes out as soon as no stop string can begin in it any more.
TEST(StopMatcherTest, HoldsBackOnlyWhatMayBeginAStopString) {
  auto matcher = StopMatcher::Create({"\n\nUser:", "END"}, false);
  ASSERT_TRUE(matcher.ok());
  std::vector<std::string> out;
  for (const char* piece : {"Hi", " E", "N", "gine", "\n", "x\n", "\n", "Use", "r", ":", "late"}) {
    out.emplace_back();
    matcher->Push(piece, &out.back());
  }
  EXPECT_THAT(out, ElementsAreArray({"Hi", " ", "", "ENgine", "", "\nx", "", "", "", "", ""}));
  EXPECT_TRUE(matcher->stopped());
  EXPECT_EQ(*matcher->matched(), "\n\nUser:");
  std::string rest;
  matcher->Finish(&rest);
  EXPECT_EQ(rest, "");
}

TEST(StopMatcherTest, HandsOutWhatItHeldAtTheEnd) {
  auto matcher = StopMatcher::Create({"abc"}, false);
  ASSERT_TRUE(matcher.ok());
  std::string out;
  EXPECT_FALSE(matcher->Push("xab", &out));
  EXPECT_EQ(out, "x");
  matcher->Finish(&out);
  EXPECT_EQ(out, "xab");
  EXPECT_EQ(matcher->matched(), nullptr);
}

TEST(StopMatcherTest, RefusesStopStringsThatMakeNoSense) {
  EXPECT_EQ(StopMatcher::Create({"a", ""}, false).status().message(), "stop string 1 is empty");
  EXPECT_EQ(StopMatcher::Create({"a\xFF"}, false).status().message(),
            "stop string 0 is not valid UTF-8 at byte 1");
}

}  // namespace
}  // namespace lorikeet
