#include "tests/fuzz/parsers.h"

#include <cmath>
#include <deque>
#include <utility>

#include "engine/base/check.h"
#include "engine/model/config_gguf.h"
#include "engine/model/config_hf.h"
#include "engine/model/fp8.h"
#include "engine/model/nf4.h"
#include "engine/tensor/dequantize.h"
#include "engine/tensor/gguf.h"
#include "engine/tensor/json.h"
#include "engine/tensor/safetensors.h"

namespace lorikeet::testing {
namespace {

void CheckRefusal(const absl::Status& status) {
  LK_CHECK_MSG(absl::IsDataLoss(status) || absl::IsInvalidArgument(status), status.ToString());
  LK_CHECK_MSG(!status.message().empty(), "no message");
}

void CheckViews(const std::map<std::string, TensorView, std::less<>>& tensors,
                std::span<const std::byte> file) {
  unsigned sum = 0;
  for (const auto& [name, view] : tensors) {
    LK_CHECK_MSG(static_cast<int64_t>(view.bytes.size()) == ByteSize(view.dtype, view.elements()),
                 name);
    if (view.bytes.empty()) continue;
    LK_CHECK_MSG(view.bytes.data() >= file.data() &&
                     view.bytes.data() + view.bytes.size() <= file.data() + file.size(),
                 name);
    for (const std::byte value : view.bytes) sum += std::to_integer<unsigned>(value);
  }
  volatile unsigned sink = sum;  // the sanitizers have seen every byte read
  (void)sink;
}

void CheckParsed(const absl::StatusOr<ModelConfig>& config) {
  if (!config.ok()) return CheckRefusal(config.status());
  LK_CHECK(config->layers > 0 && config->kv_heads > 0 && config->head_dim > 0);
  LK_CHECK(config->heads % config->kv_heads == 0);
  LK_CHECK(config->rope_inverse_frequencies.size() == size_t(config->head_dim / 2));
  LK_CHECK(config->layer_uses_rope.size() == size_t(config->layers));
  LK_CHECK(config->layer_uses_window.size() == size_t(config->layers));
  for (const float frequency : config->rope_inverse_frequencies) {
    LK_CHECK(std::isfinite(frequency) && frequency >= 0);
  }
  for (const int32_t id : config->eos_ids) LK_CHECK(id >= 0 && id < config->vocab);
}

}  // namespace

void FuzzSafetensors(std::span<const std::byte> bytes) {
  const auto tensors = ParseSafetensors(bytes, "fuzz");
  if (!tensors.ok()) return CheckRefusal(tensors.status());
  CheckViews(*tensors, bytes);
}

void FuzzGguf(std::span<const std::byte> bytes) {
  auto content = ParseGguf(bytes, "fuzz");
  if (!content.ok()) return CheckRefusal(content.status());
  CheckViews(content->tensors, bytes);
  const GgufFile file{std::move(content->metadata), TensorFile({}, std::move(content->tensors))};
  CheckParsed(ParseGgufConfig(file, "fuzz"));
}

void FuzzHfConfig(std::span<const std::byte> bytes) {
  const auto json = ParseJson({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, "fuzz");
  if (!json.ok()) return CheckRefusal(json.status());
  CheckParsed(ParseHfConfig(*json, *json, "fuzz"));
}

void FuzzCheckpoint(std::span<const std::byte> bytes) {
  auto tensors = ParseSafetensors(bytes, "fuzz");
  if (!tensors.ok()) return CheckRefusal(tensors.status());
  TensorFile file({}, *std::move(tensors));
  std::deque<AlignedBuffer> buffers;
  absl::Status status = RepackNf4(&file, &buffers);
  if (status.ok()) status = RepackFp8(&file, &buffers);
  if (!status.ok()) return CheckRefusal(status);
  for (const auto& [name, view] : file.tensors()) {
    LK_CHECK_MSG(static_cast<int64_t>(view.bytes.size()) == ByteSize(view.dtype, view.elements()),
                 name);
    if (!IsQuantized(view.dtype)) continue;
    std::vector<float> values(view.elements());
    Dequantize(view.dtype, view.bytes.data(), view.elements(), values.data());
  }
}

}  // namespace lorikeet::testing
