// Input: adapter_config.json, a zero byte, adapter_model.safetensors. Runs from the source's root.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "engine/base/check.h"
#include "engine/model/base_model_view.h"
#include "tests/fuzz/adapters.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const lorikeet::BaseModelView* base = [] {
    auto source = lorikeet::ModelSource::Open("tests/golden/models/llama");
    LK_CHECK_MSG(source.ok(), source.status().ToString());
    return new lorikeet::BaseModelView(
        std::shared_ptr<const lorikeet::ModelSource>(*std::move(source)));
  }();
  const uint8_t* zero = std::find(data, data + size, 0);
  if (zero == data + size) return 0;
  const size_t config = static_cast<size_t>(zero - data);
  lorikeet::testing::FuzzAdapter(
      *base, {reinterpret_cast<const char*>(data), config},
      {reinterpret_cast<const std::byte*>(zero + 1), size - config - 1});
  return 0;
}
