// The registry's types as messages of lorikeet.v1.
#pragma once

#include "adapters_cache/registry.h"
#include "lorikeet/v1/adapters.pb.h"

namespace lorikeet {

v1::Adapter ToProto(const AdapterInfo& info);
v1::AdapterEvent ToProto(const AdapterEvent& event);

}  // namespace lorikeet
