#include "engine/tensor/json.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/mapped_file.h"

namespace lorikeet {
namespace {

using nlohmann::json;

constexpr JsonLimits kFileLimits = {.depth = 32, .members = size_t{1} << 24};
constexpr size_t kMaxFileBytes = size_t{16} << 20;

// Builds the document from the parser's events and stops at the first thing a lenient parser would
// have to guess about.
template <typename Json>
class StrictBuilder final : public nlohmann::json_sax<Json> {
 public:
  using number_integer_t = typename Json::number_integer_t;
  using number_unsigned_t = typename Json::number_unsigned_t;
  using number_float_t = typename Json::number_float_t;
  using string_t = typename Json::string_t;
  using binary_t = typename Json::binary_t;

  explicit StrictBuilder(const JsonLimits& limits) : limits_(limits) {}

  Json& document() { return document_; }
  const std::string& error() const { return error_; }

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // JSON text has none
  bool start_object(size_t) override { return Open(Json::object()); }
  bool start_array(size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    Json& object = *open_.back();
    if (object.size() == limits_.members) {
      return Fail(absl::StrCat("an object of more than ", limits_.members, " members"));
    }
    if (!keys_.back().insert(name).second) {
      return Fail(absl::StrCat("key \"", name, "\" appears twice"));
    }
    slot_ = AddMember(object, std::move(name));
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& e) override {
    return Fail(e.what());
  }

 private:
  // The new value's place: the document, the open array's end, or the slot of the last key.
  Json* Place(Json value) {
    if (open_.empty()) {
      document_ = std::move(value);
      return &document_;
    }
    if (open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      return &open_.back()->back();
    }
    *slot_ = std::move(value);
    return slot_;
  }
  // REQUIRES: `name` is new. An object that keeps its members' order would look at all of them.
  static Json* AddMember(Json& object, string_t name) {
    auto& members = object.template get_ref<typename Json::object_t&>();
    if constexpr (requires { members.emplace_back(name, nullptr); }) {
      return &members.emplace_back(std::move(name), nullptr).second;
    } else {
      return &members[std::move(name)];
    }
  }
  template <typename T>
  bool Add(T&& value) {
    Place(Json(std::forward<T>(value)));
    return true;
  }
  bool Open(Json container) {
    if (open_.size() == limits_.depth) {
      return Fail(absl::StrCat("nested deeper than ", limits_.depth, " levels"));
    }
    open_.push_back(Place(std::move(container)));
    keys_.emplace_back();
    return true;
  }
  bool Close() {
    open_.pop_back();
    keys_.pop_back();
    return true;
  }
  bool Fail(std::string message) {
    error_ = std::move(message);
    return false;
  }

  const JsonLimits limits_;
  Json document_;
  std::vector<Json*> open_;  // containers not yet closed, outermost first
  std::vector<std::set<string_t>> keys_;  // theirs
  Json* slot_ = nullptr;
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseJson(std::string_view text, std::string_view what) {
  StrictBuilder<json> builder(kFileLimits);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::DataLossError(absl::StrCat(absl::string_view(what.data(), what.size()),
                                            ": malformed JSON: ", builder.error()));
  }
  return std::move(builder.document());
}

absl::StatusOr<nlohmann::ordered_json> ParseOrderedJson(std::string_view text,
                                                        const JsonLimits& limits) {
  StrictBuilder<nlohmann::ordered_json> builder(limits);
  if (!nlohmann::ordered_json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(absl::StrCat("malformed JSON: ", builder.error()));
  }
  return std::move(builder.document());
}

absl::StatusOr<json> ReadJsonFile(const std::filesystem::path& path) {
  std::error_code ignored;  // Open() says better what is wrong with the path
  const uintmax_t size = std::filesystem::file_size(path, ignored);
  if (!ignored && size > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path.string(), ": ", size, " bytes; at most ", kMaxFileBytes, " are read"));
  }
  LK_ASSIGN_OR_RETURN(const auto file, MappedFile::Open(path, FileAccess::kCopy));
  const std::span<const std::byte> bytes = file->bytes();
  return ParseJson({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path.string());
}

}  // namespace lorikeet
