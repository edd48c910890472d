// Variants whose linears are lowered one by one, on several threads.
#include <string>
#include <vector>

#include "tests/unit/adapter_directory.h"

namespace lorikeet {
namespace {

class LoweredAdapter : public testing::AdapterDirectory {
 protected:
  LoweredAdapter() {
    adapter_.config = {{"peft_type", "MISS"}, {"task_type", "CAUSAL_LM"}, {"target_modules", {"q_proj"}}};
  }
};

// Which fails first in time must not show.
TEST_F(LoweredAdapter, OfLinearsThatDoNotFitTheFirstIsNamed) {
  for (const char* layer : {"0", "1"}) {
    Put("base_model.model.model.layers." + std::string(layer) + ".self_attn.q_proj.miss_block", {1, 3});
  }
  for (int i = 0; i < 100; ++i) {
    ExpectRefused(absl::StatusCode::kInvalidArgument, {"; model.layers.0.self_attn.q_proj ["});
  }
}

}  // namespace
}  // namespace lorikeet
