// From files to RawAdapter, whatever the format: one line a format.
#pragma once

#include "adapters_cache/formats/adapter_files.h"
#include "adapters_cache/formats/problems.h"
#include "adapters_cache/formats/raw_adapter.h"

namespace lorikeet {

// The adapter is usable only when `problems` stays empty; otherwise it holds what could be read.
RawAdapter ParseAdapter(AdapterFiles files, Problems* problems);

}  // namespace lorikeet
