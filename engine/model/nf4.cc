#include "engine/model/nf4.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/json.h"

namespace lorikeet {
namespace {

using nlohmann::json;

constexpr char kState[] = ".quant_state.bitsandbytes__";
constexpr int64_t kBlock = Info(DType::kNF4).block_elements;

struct State {
  int64_t out = 0;
  int64_t in = 0;
  int64_t block = 0;         // values a scale covers
  int64_t nested_block = 0;  // scales a scale of scales covers; 0: scales are F32
  float nested_offset = 0;
};

// The group of one weight.
class Nf4Weight {
 public:
  Nf4Weight(const TensorFile& tensors, std::string name)
      : tensors_(tensors), name_(std::move(name)) {}

  absl::StatusOr<AlignedBuffer> Repack() {
    LK_RETURN_IF_ERROR(ReadState());
    LK_ASSIGN_OR_RETURN(const std::vector<float> levels, Floats(".quant_map", 16));
    if (!std::equal(levels.begin(), levels.end(), kNf4Levels)) {
      return absl::InvalidArgumentError(
          absl::StrCat(name_, ".quant_map holds other levels than NF4's, which is not supported"));
    }
    LK_ASSIGN_OR_RETURN(const std::vector<float> scales, Scales());
    const TensorView& codes = *tensors_.Find(name_);
    const int64_t blocks = state_.out * state_.in / kBlock;
    if (static_cast<int64_t>(codes.bytes.size()) != blocks * kBlock / 2) {
      return Misfit("", codes.bytes.size(), " bytes", blocks * kBlock / 2);
    }
    AlignedBuffer packed(ByteSize(DType::kNF4, blocks * kBlock));
    std::byte* to = packed.data();
    for (int64_t b = 0; b < blocks; ++b, to += Info(DType::kNF4).block_bytes) {
      std::memcpy(to, &scales[b * kBlock / state_.block], sizeof(float));
      std::memcpy(to + sizeof(float), codes.bytes.data() + b * kBlock / 2, kBlock / 2);
    }
    return packed;
  }

  // After Repack.
  std::vector<int64_t> shape() const { return {state_.out, state_.in}; }
  std::vector<std::string> parts() const {
    std::vector<std::string> names = {absl::StrCat(name_, ".absmax"),
                                      absl::StrCat(name_, ".quant_map"),
                                      absl::StrCat(name_, kState, "nf4")};
    if (state_.nested_block == 0) return names;
    names.push_back(absl::StrCat(name_, ".nested_absmax"));
    names.push_back(absl::StrCat(name_, ".nested_quant_map"));
    return names;
  }

 private:
  absl::Status Misfit(const char* part, int64_t found, const char* unit,
                      int64_t expected) const {
    return absl::DataLossError(
        absl::StrCat(name_, part, " has ", found, unit, ", not ", expected));
  }

  // A whole number of `object` from 1 to `max`.
  absl::StatusOr<int64_t> Whole(const json& value, const char* what, int64_t max) const {
    if (value.is_number_integer() && value >= 1 && value <= max) return value.get<int64_t>();
    return absl::DataLossError(absl::StrCat(name_, kState, "nf4: ", what, " is ",
                                            value.dump().substr(0, 60),
                                            "; it must be an integer from 1 to ", max));
  }

  absl::Status ReadState() {
    constexpr int64_t kMaxWidth = 1 << 24;
    const std::string where = absl::StrCat(name_, kState, "nf4");
    const TensorView& bytes = *tensors_.Find(where);
    const std::string_view text(reinterpret_cast<const char*>(bytes.bytes.data()),
                                bytes.bytes.size());
    LK_ASSIGN_OR_RETURN(const json state, ParseJson(text, where));
    const auto get = [&state](const char* key) {
      return state.is_object() ? state.value(json::json_pointer(key), json()) : json();
    };
    LK_ASSIGN_OR_RETURN(state_.out, Whole(get("/shape/0"), "shape[0]", kMaxWidth));
    LK_ASSIGN_OR_RETURN(state_.in, Whole(get("/shape/1"), "shape[1]", kMaxWidth));
    LK_ASSIGN_OR_RETURN(state_.block, Whole(get("/blocksize"), "blocksize", kMaxWidth));
    for (const auto& [what, width] : {std::pair("blocksize", state_.block), {"width", state_.in}}) {
      if (width % kBlock == 0) continue;
      return absl::InvalidArgumentError(absl::StrCat(name_, ": NF4 with a ", what, " of ", width,
                                                     " is not supported; it must be a multiple of ",
                                                     kBlock));
    }
    const json offset = get("/nested_offset");
    if (offset.is_null()) return absl::OkStatus();
    if (!offset.is_number()) return absl::DataLossError(where + ": nested_offset is no number");
    state_.nested_offset = offset.get<float>();
    LK_ASSIGN_OR_RETURN(state_.nested_block,
                        Whole(get("/nested_blocksize"), "nested_blocksize", kMaxWidth));
    return absl::OkStatus();
  }

  absl::StatusOr<const TensorView*> Part(const char* part, DType dtype, int64_t count) const {
    const TensorView* view = tensors_.Find(absl::StrCat(name_, part));
    if (view == nullptr) return absl::DataLossError(absl::StrCat(name_, part, " is missing"));
    if (view->dtype != dtype) {
      return absl::DataLossError(absl::StrCat(name_, part, " is ", Info(view->dtype).name, ", not ",
                                              Info(dtype).name));
    }
    if (view->elements() != count) return Misfit(part, view->elements(), " values", count);
    return view;
  }

  absl::StatusOr<std::vector<float>> Floats(const char* part, int64_t count) const {
    LK_ASSIGN_OR_RETURN(const TensorView* view, Part(part, DType::kF32, count));
    std::vector<float> values(count);
    Dequantize(view->dtype, view->bytes.data(), count, values.data());
    return values;
  }

  absl::StatusOr<std::vector<float>> Scales() const {
    const int64_t count = (state_.out * state_.in + state_.block - 1) / state_.block;
    if (state_.nested_block == 0) return Floats(".absmax", count);
    LK_ASSIGN_OR_RETURN(const TensorView* codes, Part(".absmax", DType::kU8, count));
    LK_ASSIGN_OR_RETURN(const std::vector<float> levels, Floats(".nested_quant_map", 256));
    const int64_t outer = (count + state_.nested_block - 1) / state_.nested_block;
    LK_ASSIGN_OR_RETURN(const std::vector<float> steps, Floats(".nested_absmax", outer));
    std::vector<float> scales(count);
    for (int64_t i = 0; i < count; ++i) {
      const int code = std::to_integer<int>(codes->bytes[i]);
      scales[i] = levels[code] * steps[i / state_.nested_block] + state_.nested_offset;
    }
    return scales;
  }

  const TensorFile& tensors_;
  const std::string name_;
  State state_;
};

// Names of the weights that have a quantisation state.
absl::StatusOr<std::vector<std::string>> Quantised(const TensorFile& tensors) {
  std::vector<std::string> names;
  for (const auto& [name, view] : tensors.tensors()) {
    const size_t at = name.find(kState);
    if (at == std::string::npos) continue;
    const std::string weight = name.substr(0, at);
    const std::string type = name.substr(at + std::size(kState) - 1);
    if (type != "nf4") {
      return absl::InvalidArgumentError(absl::StrCat(
          weight, ": bitsandbytes' type '", type, "' is not supported; nf4 is"));
    }
    if (tensors.Find(weight) == nullptr) {
      return absl::DataLossError(absl::StrCat(weight, " is missing, ", name, " is there"));
    }
    names.push_back(weight);
  }
  return names;
}

}  // namespace

absl::Status RepackNf4(TensorFile* tensors, std::deque<AlignedBuffer>* buffers) {
  LK_ASSIGN_OR_RETURN(const std::vector<std::string> names, Quantised(*tensors));
  for (const std::string& name : names) {
    Nf4Weight weight(*tensors, name);
    LK_ASSIGN_OR_RETURN(AlignedBuffer packed, weight.Repack());
    for (const std::string& part : weight.parts()) tensors->Erase(part);
    buffers->push_back(std::move(packed));
    tensors->Put(name, {DType::kNF4, weight.shape(), {buffers->back().data(), buffers->back().size()}});
  }
  return absl::OkStatus();
}

}  // namespace lorikeet
