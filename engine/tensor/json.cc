#include "engine/tensor/json.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/mapped_file.h"

namespace lorikeet {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxFileBytes = size_t{16} << 20;

// Builds the document from the parser's events and stops at the first thing a lenient parser would
// have to guess about.
class StrictBuilder final : public nlohmann::json_sax<json> {
 public:
  json& document() { return document_; }
  const std::string& error() const { return error_; }

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // JSON text has none
  bool start_object(size_t) override { return Open(json::object()); }
  bool start_array(size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    json& object = *open_.back();
    if (object.contains(name)) return Fail(absl::StrCat("key \"", name, "\" appears twice"));
    slot_ = &object[name];
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& e) override {
    return Fail(e.what());
  }

 private:
  // The new value's place: the document, the open array's end, or the slot of the last key.
  json* Place(json value) {
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
  template <typename T>
  bool Add(T&& value) {
    Place(json(std::forward<T>(value)));
    return true;
  }
  bool Open(json container) {
    if (open_.size() == kMaxDepth) {
      return Fail(absl::StrCat("nested deeper than ", kMaxDepth, " levels"));
    }
    open_.push_back(Place(std::move(container)));
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }
  bool Fail(std::string message) {
    error_ = std::move(message);
    return false;
  }

  json document_;
  std::vector<json*> open_;  // containers not yet closed, outermost first
  json* slot_ = nullptr;
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseJson(std::string_view text, std::string_view what) {
  StrictBuilder builder;
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::DataLossError(absl::StrCat(absl::string_view(what.data(), what.size()),
                                            ": malformed JSON: ", builder.error()));
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
