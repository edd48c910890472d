#include "engine/tensor/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using ::testing::AllOf;
using testing::AsBytes;
using testing::GgufBytes;
using ::testing::HasSubstr;
using testing::Raw;
using testing::RawVector;
using testing::TempDir;

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

// Every kind of metadata and two tensors.
GgufBytes Everything() {
  GgufBytes file;
  file.Value("u8", 0, Raw(uint8_t{200}))
      .Value("i8", 1, Raw(int8_t{-100}))
      .Value("u16", 2, Raw(uint16_t{60000}))
      .Value("i16", 3, Raw(int16_t{-30000}))
      .Value("u32", 4, Raw(uint32_t{4000000000}))
      .Value("i32", 5, Raw(int32_t{-2000000000}))
      .Value("f32", 6, Raw(1.5f))
      .Value("bool", 7, Raw(uint8_t{1}))
      .Text("string", "text")
      .Value("u64", 10, Raw(uint64_t{1} << 62))
      .Value("i64", 11, Raw(int64_t{-5}))
      .Value("f64", 12, Raw(2.25))
      .Array("ints", 5, 3, RawVector<int32_t>({1, -2, 3}))
      .Array("floats", 6, 2, RawVector<float>({0.5f, -4.0f}))
      .Array("strings", 8, 2, GgufBytes::String("a") + GgufBytes::String(""))
      .Array("none", 8, 0, "")
      .Tensor("matrix", {3, 2}, 0, RawVector<float>({1, 2, 3, 4, 5, 6}))
      .Tensor("quantised", {32, 2}, 8, std::string(68, 'q'));
  return file;
}

TEST(GgufTest, ReadsEveryKindOfMetadata) {
  const std::string file = Everything().Build();
  const auto gguf = ParseGguf(AsBytes(file), "file");
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const GgufMetadata& m = gguf->metadata;
  EXPECT_EQ(m.at("u8"), GgufValue(int64_t{200}));
  EXPECT_EQ(m.at("i8"), GgufValue(int64_t{-100}));
  EXPECT_EQ(m.at("u16"), GgufValue(int64_t{60000}));
  EXPECT_EQ(m.at("i16"), GgufValue(int64_t{-30000}));
  EXPECT_EQ(m.at("u32"), GgufValue(int64_t{4000000000}));
  EXPECT_EQ(m.at("i32"), GgufValue(int64_t{-2000000000}));
  EXPECT_EQ(m.at("f32"), GgufValue(1.5));
  EXPECT_EQ(m.at("bool"), GgufValue(int64_t{1}));
  EXPECT_EQ(m.at("string"), GgufValue(std::string("text")));
  EXPECT_EQ(m.at("u64"), GgufValue(int64_t{1} << 62));
  EXPECT_EQ(m.at("i64"), GgufValue(int64_t{-5}));
  EXPECT_EQ(m.at("f64"), GgufValue(2.25));
  EXPECT_EQ(m.at("ints"), GgufValue(std::vector<int64_t>{1, -2, 3}));
  EXPECT_EQ(m.at("floats"), GgufValue(std::vector<double>{0.5, -4.0}));
  EXPECT_EQ(m.at("strings"), GgufValue(std::vector<std::string>{"a", ""}));
  EXPECT_EQ(m.at("none"), GgufValue(std::vector<std::string>{}));
  EXPECT_EQ(m.size(), 16u);
}

TEST(GgufTest, TurnsDimensionsRoundAndFindsTheBytes) {
  const std::string file = Everything().Build();
  const auto gguf = ParseGguf(AsBytes(file), "file");
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  ASSERT_EQ(gguf->tensors.size(), 2u);
  const TensorView& matrix = gguf->tensors.at("matrix");
  EXPECT_EQ(matrix.shape, (std::vector<int64_t>{2, 3}));
  float second_row;
  std::memcpy(&second_row, matrix.row(1), sizeof(float));
  EXPECT_EQ(second_row, 4.0f);
  const TensorView& quantised = gguf->tensors.at("quantised");
  EXPECT_EQ(quantised.dtype, DType::kQ8_0);
  EXPECT_EQ(quantised.shape, (std::vector<int64_t>{2, 32}));
  EXPECT_EQ(quantised.bytes.size(), 68u);
  EXPECT_EQ(quantised.bytes[0], std::byte{'q'});
}

TEST(GgufTest, HonoursTheFilesAlignment) {
  GgufBytes bytes;
  bytes.alignment = 128;
  bytes.Uint("general.alignment", 128)
      .Tensor("a", {1}, 0, Raw(7.0f))
      .Tensor("b", {1}, 0, Raw(9.0f));
  const std::string file = bytes.Build();
  const auto gguf = ParseGguf(AsBytes(file), "file");
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  float b;
  std::memcpy(&b, gguf->tensors.at("b").bytes.data(), sizeof(b));
  EXPECT_EQ(b, 9.0f);
}

TEST(GgufTest, Version2IsTheSameAndOthersAreNamed) {
  GgufBytes file = Everything();
  file.version = 2;
  const std::string v2 = file.Build();
  EXPECT_TRUE(ParseGguf(AsBytes(v2), "file").ok());
  for (const auto& [version, message] : std::vector<std::pair<uint32_t, const char*>>{
           {0, "version 0"}, {1, "version 1"}, {4, "version 4"}, {0x03000000, "big-endian"}}) {
    file.version = version;
    const std::string bytes = file.Build();
    const absl::Status status = ParseGguf(AsBytes(bytes), "file").status();
    EXPECT_EQ(status.code(), kInvalid) << version;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

TEST(GgufTest, EveryTruncationIsRefused) {
  const std::string file = Everything().Build();
  for (size_t size = 0; size < file.size(); ++size) {
    const std::vector<char> cut(file.begin(), file.begin() + size);
    const absl::Status status = ParseGguf(AsBytes({cut.data(), cut.size()}), "cut").status();
    EXPECT_EQ(status.code(), size < 8 ? kInvalid : kDataLoss) << size << " bytes: " << status;
  }
}

struct BadFile {
  const char* what;
  std::function<void(GgufBytes&)> add;
  absl::StatusCode code;
  const char* message;  // part of it
};

class GgufBadFileTest : public ::testing::TestWithParam<BadFile> {};

TEST_P(GgufBadFileTest, IsRefused) {
  GgufBytes bytes;
  GetParam().add(bytes);
  const std::string file = bytes.Build();
  const auto gguf = ParseGguf(AsBytes(file), "x.gguf");
  ASSERT_FALSE(gguf.ok());
  EXPECT_EQ(gguf.status().code(), GetParam().code) << gguf.status();
  EXPECT_THAT(std::string(gguf.status().message()),
              AllOf(HasSubstr("x.gguf"), HasSubstr(GetParam().message)));
}

constexpr uint64_t kHuge = uint64_t{1} << 61;

const BadFile kBadFiles[] = {
    {"MetadataCount", [](GgufBytes& f) { f.metadata_count = ~uint64_t{0}; }, kDataLoss,
     "truncated"},
    {"TensorCount", [](GgufBytes& f) { f.tensor_count = ~uint64_t{0}; }, kDataLoss, "truncated"},
    {"StringLength", [](GgufBytes& f) { f.Value("k", 8, Raw(kHuge)); }, kDataLoss, "truncated"},
    {"StringLengthWraps", [](GgufBytes& f) { f.Value("k", 8, Raw(~uint64_t{0})); }, kDataLoss,
     "truncated"},
    {"ArrayCount", [](GgufBytes& f) { f.Array("k", 4, kHuge, ""); }, kDataLoss, "truncated"},
    {"ArrayBytesWrap", [](GgufBytes& f) { f.Array("k", 10, kHuge, "12345678"); }, kDataLoss,
     "truncated"},
    {"StringArrayCount", [](GgufBytes& f) { f.Array("k", 8, kHuge, ""); }, kDataLoss, "truncated"},
    {"ArrayOfArrays", [](GgufBytes& f) { f.Array("k", 9, 1, Raw(uint32_t{4}) + Raw(uint64_t{0})); },
     kInvalid, "'k' is an array of arrays"},
    {"UnknownValueType", [](GgufBytes& f) { f.Value("k", 13, "12345678"); }, kDataLoss,
     "'k' has unknown type 13"},
    {"UnknownArrayType", [](GgufBytes& f) { f.Array("k", 99, 1, "12345678"); }, kDataLoss,
     "'k' has unknown type 99"},
    {"KeyTwice", [](GgufBytes& f) { f.Uint("k", 1).Uint("k", 1); }, kDataLoss, "'k' appears twice"},
    {"BoolOfTwo", [](GgufBytes& f) { f.Value("k", 7, "\2"); }, kDataLoss, "a bool is 2"},
    {"Beyond63Bits", [](GgufBytes& f) { f.Value("k", 10, Raw(~uint64_t{0})); }, kDataLoss,
     "beyond 63 bits"},
    {"AlignmentZero", [](GgufBytes& f) { f.Uint("general.alignment", 0); }, kDataLoss, "alignment"},
    {"AlignmentThree", [](GgufBytes& f) { f.Uint("general.alignment", 3); }, kDataLoss,
     "power of two"},
    {"AlignmentHuge", [](GgufBytes& f) { f.Uint("general.alignment", 1u << 31); }, kDataLoss,
     "alignment"},
    {"AlignmentText", [](GgufBytes& f) { f.Text("general.alignment", "32"); }, kDataLoss,
     "alignment"},
    {"TensorTwice", [](GgufBytes& f) { f.Tensor("t", {1}, 0, "1234").Tensor("t", {1}, 0, "1234"); },
     kDataLoss, "'t' appears twice"},
    {"Rank",
     [](GgufBytes& f) {
       f.Tensor("t", {1, 1, 1, 1, 1}, 0, "1234");
     },
     kDataLoss, "5 dimensions"},
    {"NegativeDimension", [](GgufBytes& f) { f.Tensor("t", {~uint64_t{0}}, 0, "1234"); }, kDataLoss,
     "dimension 0 is 18446744073709551615"},
    {"ProductOverflows",
     [](GgufBytes& f) {
       f.Tensor("t", {1u << 31, 1u << 31, 4}, 0, "1234");
     },
     kDataLoss, "overflows"},
    {"BytesOverflow",
     [](GgufBytes& f) {
       f.Tensor("t", {kHuge, 2}, 0, "1234");
     },
     kDataLoss, "overflows"},
    {"HalfABlock",
     [](GgufBytes& f) {
       f.Tensor("t", {48, 2}, 8, std::string(102, 0));
     },
     kDataLoss, "multiple of 32"},
    {"KnownButUnsupportedType", [](GgufBytes& f) { f.Tensor("t", {32}, 6, std::string(22, 0)); },
     kInvalid,
     "'t' has type Q5_0; supported are F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16"},
    {"UnknownType", [](GgufBytes& f) { f.Tensor("t", {32}, 77, "1234"); }, kDataLoss,
     "unknown type 77"},
    {"DataMissing", [](GgufBytes& f) { f.Entry("t", {8}, 0, 0); }, kDataLoss,
     "'t' takes 32 bytes from data offset 0"},
    {"DataCutOff", [](GgufBytes& f) { f.Tensor("t", {8}, 0, std::string(31, 0)); }, kDataLoss,
     "of 31"},
    {"OffsetBeyond", [](GgufBytes& f) { f.Entry("t", {0}, 0, kHuge); }, kDataLoss, "truncated"},
    {"OffsetWraps", [](GgufBytes& f) { f.Entry("t", {8}, 0, ~uint64_t{31}); }, kDataLoss,
     "truncated"},
    {"OffsetUnaligned",
     [](GgufBytes& f) { f.Tensor("s", {9}, 0, std::string(36, 0)).Entry("t", {1}, 0, 4); },
     kDataLoss, "not aligned to 32"},
    {"Overlap",
     [](GgufBytes& f) { f.Tensor("s", {16}, 0, std::string(64, 0)).Entry("t", {8}, 0, 32); },
     kDataLoss, "'s' and 't' overlap"},
};

INSTANTIATE_TEST_SUITE_P(Bad, GgufBadFileTest, ::testing::ValuesIn(kBadFiles),
                         [](const auto& info) { return info.param.what; });

TEST(GgufFileTest, ReadsFromDisk) {
  const TempDir dir;
  const auto file = ReadGguf(dir.Write("m.gguf", Everything().Build()));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_NE(file->tensors.Find("matrix"), nullptr);
  EXPECT_EQ(ReadGguf(dir.path() / "none.gguf").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadGguf(dir.Write("text", "hello, world")).status().code(), kInvalid);
}

}  // namespace
}  // namespace lorikeet
