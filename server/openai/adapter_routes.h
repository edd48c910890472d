// Loading and unloading adapters over HTTP, as vLLM's and SGLang's users know it: requests as those
// of lorikeet.v1, and answers.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "adapters_cache/registry.h"
#include "lorikeet/v1/adapters.pb.h"
#include "server/http/message.h"

namespace lorikeet {

// {"lora_name", "lora_path"} and, as vLLM has it, "load_inplace": a name in use is led to the new
// version; as SGLang has it, "pinned". A lora_int_id or lora_id, which other servers number adapters by, is
// not needed and must not be given.
absl::StatusOr<v1::LoadAdapterRequest> ParseLoad(const std::string& body);
absl::StatusOr<v1::UnloadAdapterRequest> ParseUnload(const std::string& body);

// "Success: LoRA adapter 'x' added successfully." as text, else an error.
HttpResponse VllmAnswer(const absl::Status& status, const std::string& name, const char* done);
// {"success", "error_message", "loaded_adapters": {name: path}}.
HttpResponse SglangAnswer(const absl::Status& status, const std::vector<AdapterInfo>& loaded);

}  // namespace lorikeet
