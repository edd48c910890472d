// Loading and unloading adapters over HTTP, as vLLM's and SGLang's users know it.
#pragma once

#include "server/adapter_admin.h"
#include "server/openai/http_call.h"

namespace lorikeet {

// Load: {"lora_name", "lora_path"} and, as vLLM has it, "load_inplace": a name in use is led to the
// new version; as SGLang has it, "pinned". A lora_int_id or lora_id, which other servers number
// adapters by, is not needed and must not be given.
//
// Answered by "Success: LoRA adapter 'x' added successfully." as text, or an error.
HttpOutcome LoadVllm(AdapterAdmin& admin, const HttpCall& call);
HttpOutcome UnloadVllm(AdapterAdmin& admin, const HttpCall& call);
// Answered by {"success", "error_message", "loaded_adapters": {name: path}}.
HttpOutcome LoadSglang(AdapterAdmin& admin, const HttpCall& call);
HttpOutcome UnloadSglang(AdapterAdmin& admin, const HttpCall& call);

}  // namespace lorikeet
