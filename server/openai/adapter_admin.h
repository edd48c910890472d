// Loading and unloading adapters over HTTP, as vLLM's and SGLang's users know it. The work is the
// registry's, on its threads.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "adapters_cache/registry.h"
#include "server/http/message.h"
#include "server/metrics.h"

namespace lorikeet {

struct AdapterOrder {
  std::string name;
  std::string path;
  bool replace = false;
  bool pin = false;
};

// {"lora_name", "lora_path"} and, as vLLM has it, "load_inplace": a name in use is led to the new
// version; as SGLang has it, "pinned". A lora_int_id or lora_id, which other servers number adapters by, is
// not needed and must not be given.
absl::StatusOr<AdapterOrder> ParseLoad(const std::string& body);
absl::StatusOr<AdapterOrder> ParseUnload(const std::string& body);

// `respond` makes the answer once the work is done.
template <typename Result>
using MakeResponse = std::function<HttpResponse(const absl::StatusOr<Result>&)>;

std::unique_ptr<HttpAnswer> StartLoad(AdapterRegistry& registry, Metrics* metrics,
                                      const AdapterOrder& order, std::function<void()> wake,
                                      MakeResponse<AdapterInfo> respond);
std::unique_ptr<HttpAnswer> StartUnload(AdapterRegistry& registry, std::chrono::microseconds drain,
                                        const AdapterOrder& order, std::function<void()> wake,
                                        MakeResponse<UnloadResult> respond);

// "Success: LoRA adapter 'x' added successfully." as text, else an error.
HttpResponse VllmAnswer(const absl::Status& status, const std::string& name, const char* done);
// {"success", "error_message", "loaded_adapters": {name: path}}.
HttpResponse SglangAnswer(const absl::Status& status, const AdapterRegistry& registry);

}  // namespace lorikeet
