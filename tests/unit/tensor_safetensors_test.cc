#include "engine/tensor/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <thread>

#include "engine/tensor/json.h"
#include "engine/tensor/mapped_file.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using ::testing::AllOf;
using testing::AsBytes;
using ::testing::HasSubstr;
using testing::Raw;
using testing::RawVector;
using testing::Safetensors;
using testing::TempDir;

constexpr char kTwoTensors[] = R"({"__metadata__":{"format":"pt"},)"
                               R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},)"
                               R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}   )";

std::string TwoTensors() {
  return Safetensors(
      kTwoTensors, RawVector<float>({1, 2, 3, 4}) + RawVector<uint16_t>({0x3f80, 0x4000, 0x4040}));
}

TEST(SafetensorsTest, GivesTheViewsOfTheHeader) {
  const std::string file = TwoTensors();
  const auto tensors = ParseSafetensors(AsBytes(file), "file");
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 2u);
  const TensorView& a = tensors->at("a");
  EXPECT_EQ(a.dtype, DType::kF32);
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(a.bytes.data()), a.bytes.size()),
            RawVector<float>({1, 2, 3, 4}));
  const TensorView& b = tensors->at("b");
  EXPECT_EQ(b.dtype, DType::kBF16);
  EXPECT_EQ(b.bytes.size(), 6u);
  EXPECT_EQ(b.bytes.data(), a.bytes.data() + 16);
}

TEST(SafetensorsTest, ReadsScalarsAndEmptyTensors) {
  const std::string file =
      Safetensors(R"({"s":{"dtype":"F16","shape":[],"data_offsets":[0,2]},)"
                  R"("e":{"dtype":"F32","shape":[4,0,7],"data_offsets":[0,0]}})",
                  "xx");
  const auto tensors = ParseSafetensors(AsBytes(file), "file");
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ(tensors->at("s").elements(), 1);
  EXPECT_EQ(tensors->at("e").elements(), 0);
  EXPECT_EQ(tensors->at("e").rows(), 0);
}

struct BadHeader {
  const char* what;
  const char* header;
  size_t data_bytes;
  absl::StatusCode code;
  const char* message;  // part of it
};

class SafetensorsHeaderTest : public ::testing::TestWithParam<BadHeader> {};

TEST_P(SafetensorsHeaderTest, IsRefused) {
  const BadHeader& bad = GetParam();
  const std::string file = Safetensors(bad.header, std::string(bad.data_bytes, 'd'));
  const auto tensors = ParseSafetensors(AsBytes(file), "x.safetensors");
  ASSERT_FALSE(tensors.ok());
  EXPECT_EQ(tensors.status().code(), bad.code) << tensors.status();
  EXPECT_THAT(std::string(tensors.status().message()),
              AllOf(HasSubstr("x.safetensors"), HasSubstr(bad.message)));
}

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

const BadHeader kBadHeaders[] = {
    {"Empty", "", 0, kDataLoss, "malformed JSON"},
    {"NotAnObject", "[]", 0, kDataLoss, "not a JSON object"},
    {"CutOff", R"({"a":{"dtype":"F32")", 0, kDataLoss, "malformed JSON"},
    {"Trailing", "{} {}", 0, kDataLoss, "malformed JSON"},
    {"SameNameTwice",
     R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
     R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
     4, kDataLoss, R"("a" appears twice)"},
    {"SameKeyTwice", R"({"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}})", 4,
     kDataLoss, "appears twice"},
    {"MetadataNotText", R"({"__metadata__":{"n":1}})", 0, kDataLoss, "\"n\" is not a string"},
    {"MetadataNotAnObject", R"({"__metadata__":[]})", 0, kDataLoss, "__metadata__"},
    {"UnknownType", R"({"t":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}})", 4, kInvalid,
     "tensor 't' has dtype F8_E5M2; F32, F16, BF16, F8_E4M3, U8"},
    {"TypeNotText", R"({"t":{"dtype":3,"shape":[1],"data_offsets":[0,4]}})", 4, kDataLoss,
     "dtype is not a string"},
    {"NoOffsets", R"({"t":{"dtype":"F32","shape":[1]}})", 4, kDataLoss, "exactly dtype, shape"},
    {"ExtraKey", R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4, kDataLoss,
     "exactly dtype, shape"},
    {"TensorIsNumber", R"({"t":7})", 0, kDataLoss, "tensor 't'"},
    {"NegativeSize", R"({"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, kDataLoss,
     "size -1"},
    {"FractionalSize", R"({"t":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4, kDataLoss,
     "size 1.0"},
    {"HugeSize", R"({"t":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4,
     kDataLoss, "18446744073709551615"},
    {"BeyondAllIntegers",
     R"({"t":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}})", 4, kDataLoss,
     "shape has the size"},
    {"ProductOverflows",
     R"({"t":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, kDataLoss,
     "overflows"},
    {"BytesOverflow", R"({"t":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})",
     0, kDataLoss, "overflows"},
    {"TooManyDimensions",
     R"({"t":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})", 4, kDataLoss,
     "at most 8"},
    {"OffsetsBackwards", R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, kDataLoss,
     "[4, 0]"},
    {"NegativeOffset", R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4, kDataLoss,
     "[-4, 0]"},
    {"BeyondTheFile", R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 7, kDataLoss,
     "within the 7 bytes"},
    {"OneOffset", R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, kDataLoss,
     "not [begin, end]"},
    {"SizeDiffers", R"({"t":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, kDataLoss,
     "takes 12 bytes, data_offsets [0, 8] hold 8"},
    {"Overlap",
     R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
     R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
     12, kDataLoss, "'b' begins at data offset 4, inside"},
    {"SameBytes",
     R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
     R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
     4, kDataLoss, "inside the tensor before it"},
    {"Gap",
     R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
     R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
     12, kDataLoss, "'b' begins at data offset 8, leaving a gap after 4"},
    {"BytesLeftOver", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5, kDataLoss,
     "end at data offset 4, the file at 5"},
};

INSTANTIATE_TEST_SUITE_P(Bad, SafetensorsHeaderTest, ::testing::ValuesIn(kBadHeaders),
                         [](const auto& info) { return info.param.what; });

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string file = TwoTensors();
  for (size_t size = 0; size < file.size(); ++size) {
    // Of the exact size, so that a read beyond the end is seen by the address sanitizer.
    const std::vector<char> cut(file.begin(), file.begin() + size);
    const auto tensors = ParseSafetensors(AsBytes({cut.data(), cut.size()}), "cut");
    EXPECT_EQ(tensors.status().code(), kDataLoss) << size << " bytes: " << tensors.status();
  }
}

TEST(SafetensorsTest, HeaderLengthsThatCannotBeAreRefused) {
  for (const uint64_t length : {uint64_t{1} << 31, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{7}}) {
    const std::string file = Raw(length) + "{}";
    EXPECT_EQ(ParseSafetensors(AsBytes(file), "x").status().code(), kDataLoss) << length;
  }
}

TEST(SafetensorsTest, DeepHeadersAreRefusedWithoutRecursion) {
  const std::string file = Safetensors(R"({"a":)" + std::string(1'000'000, '['), "");
  const absl::Status status = ParseSafetensors(AsBytes(file), "x").status();
  EXPECT_EQ(status.code(), kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("nested deeper than 32"));
}

TEST(SafetensorsFileTest, AFileIsReadAndItsTensorsFound) {
  const TempDir dir;
  const auto file = ReadSafetensors(dir.Write("adapter.safetensors", TwoTensors()));
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_NE(file->Find("b"), nullptr);
  EXPECT_EQ(file->Find("b")->bytes.size(), 6u);
  EXPECT_EQ(file->Find("c"), nullptr);
}

TEST(MappedFileTest, BothWaysOfReadingGiveTheSameAndSayWhereTheFileLies) {
  const TempDir dir;
  const auto path = dir.Write("adapter.safetensors", TwoTensors());
  std::filesystem::create_symlink(path, dir.path() / "link");
  for (const FileAccess access : {FileAccess::kMap, FileAccess::kCopy}) {
    const auto file = MappedFile::Open(dir.path() / "link", access);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ(std::memcmp((*file)->bytes().data(), TwoTensors().data(), TwoTensors().size()), 0);
    EXPECT_EQ((*file)->real_path(), std::filesystem::canonical(path));
  }
}

TEST(MappedFileTest, ACopyOutlivesTheFile) {
  const TempDir dir;
  const auto path = dir.Write("adapter.safetensors", TwoTensors());
  const auto file = MappedFile::Open(path, FileAccess::kCopy);
  ASSERT_TRUE(file.ok()) << file.status();
  std::filesystem::resize_file(path, 0);  // reading a mapping would now end the process
  EXPECT_EQ(std::memcmp((*file)->bytes().data(), TwoTensors().data(), TwoTensors().size()), 0);
}

// Half of the old bytes and half of the new are no adapter that anyone made.
TEST(MappedFileTest, AFileThatIsWrittenToWhileItIsCopiedIsRefused) {
  const TempDir dir;
  const auto path = dir.Write("large", std::string(32 << 20, 'x'));
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    for (int64_t i = 0; !stop; ++i) {
      file.seekp((i * 4096) % (32 << 20));
      file.put('y').flush();
    }
  });
  absl::Status status;
  while (status.ok()) status = MappedFile::Open(path, FileAccess::kCopy).status();
  stop = true;
  writer.join();
  EXPECT_EQ(status.code(), kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("large: changed while it was read"));
  EXPECT_TRUE(MappedFile::Open(path, FileAccess::kCopy).ok()) << "once nobody writes";
}

TEST(SafetensorsFileTest, WhatIsNotAFileIsRefused) {
  const TempDir dir;
  EXPECT_EQ(ReadSafetensors(dir.path() / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadSafetensors(dir.path()).status().code(), kInvalid);
  EXPECT_EQ(ReadSafetensors("/dev/zero").status().code(), kInvalid);
  EXPECT_EQ(ReadSafetensors(dir.Write("empty", "")).status().code(), kDataLoss);
}

std::string OneTensor(const std::string& name) {
  return Safetensors(R"({")" + name + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                     "data");
}

TEST(SafetensorsModelTest, ShardsReadAsOneFile) {
  const TempDir dir;
  dir.Write("m-1.safetensors", OneTensor("a"));
  dir.Write("m-2.safetensors", OneTensor("b"));
  dir.Write("model.safetensors.index.json",
            R"({"metadata":{"total_size":8},)"
            R"("weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  const auto file = ReadSafetensorsModel(dir.path());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_NE(file->Find("a"), nullptr);
  EXPECT_NE(file->Find("b"), nullptr);
}

TEST(SafetensorsModelTest, IndexAndShardsMustAgree) {
  struct Case {
    const char* weight_map;
    absl::StatusCode code;
    const char* message;
  };
  const Case cases[] = {
      {R"({"a":"m-1.safetensors","b":"m-1.safetensors"})", kDataLoss, "'b' is not in m-1"},
      {R"({"a":"m-2.safetensors","b":"m-1.safetensors"})", kDataLoss, "is not in m-"},
      {R"({"a":"m-1.safetensors","b":"m-3.safetensors"})", kDataLoss, "'a' is also in m-1"},
      {R"({"a":"m-4.safetensors"})", absl::StatusCode::kNotFound, "m-4.safetensors"},
      {R"({"a":"../m-1.safetensors"})", kDataLoss, "no plain file name"},
      {R"({"a":"/etc/passwd"})", kDataLoss, "no plain file name"},
      {R"({"a":17})", kDataLoss, "no plain file name"},
      {R"([])", kDataLoss, "weight_map"},
  };
  const TempDir dir;
  dir.Write("m-1.safetensors", OneTensor("a"));
  dir.Write("m-2.safetensors", OneTensor("b"));
  dir.Write("m-3.safetensors", OneTensor("a"));
  for (const Case& c : cases) {
    dir.Write("model.safetensors.index.json",
              std::string(R"({"weight_map":)") + c.weight_map + "}");
    const absl::Status status = ReadSafetensorsModel(dir.path()).status();
    EXPECT_EQ(status.code(), c.code) << c.weight_map << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message)) << c.weight_map;
  }
}

TEST(SafetensorsModelTest, SaysWhatADirectoryLacks) {
  const TempDir dir;
  const absl::Status status = ReadSafetensorsModel(dir.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("neither model.safetensors nor"));
}

TEST(JsonTest, KeepsValuesAndRefusesWhatReadersDisagreeOn) {
  const auto value = ParseJson(R"({"a":[1,-2,2.5,null,true,"x",{"b":[]}],"c":{}})", "t");
  ASSERT_TRUE(value.ok()) << value.status();
  EXPECT_EQ(value->dump(), R"({"a":[1,-2,2.5,null,true,"x",{"b":[]}],"c":{}})");
  for (const char* text : {R"({"a":1,"a":1})", R"([{"a":{"b":1,"b":2}}])", "1 2", "NaN", "[1,]",
                           "{\"a\":\"\xff\"}", "'a'", ""}) {
    EXPECT_EQ(ParseJson(text, "t").status().code(), kDataLoss) << text;
  }
}

TEST(JsonTest, HugeFilesAreRefusedUnread) {
  const TempDir dir;
  const auto path = dir.Write("config.json", "{}");
  EXPECT_TRUE(ReadJsonFile(path).ok());
  std::filesystem::resize_file(path, uintmax_t{1} << 40);  // sparse
  const absl::Status status = ReadJsonFile(path).status();
  EXPECT_EQ(status.code(), kInvalid);
  EXPECT_THAT(std::string(status.message()), HasSubstr("1099511627776 bytes"));
}

}  // namespace
}  // namespace lorikeet
