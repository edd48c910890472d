#include "server/adapter_proto.h"

#include <string>

namespace lorikeet {

v1::Adapter ToProto(const AdapterInfo& info) {
  v1::Adapter proto;
  proto.set_name(info.name);
  proto.set_version(info.version);
  proto.set_variant(info.variant);
  proto.set_path(info.path);
  proto.set_min_rank(info.min_rank);
  proto.set_max_rank(info.max_rank);
  proto.set_modules(info.modules);
  proto.set_bytes(info.bytes);
  proto.set_device_bytes(info.device_bytes);
  proto.set_host_misses(info.host_misses);
  proto.set_in_host(info.in_host);
  proto.set_pinned(info.pinned);
  for (const AdapterTarget& target : info.targets) {
    v1::AdapterTarget* added = proto.add_targets();
    added->set_target(target.version);
    added->set_weight(target.weight);
  }
  proto.set_active_requests(info.leases);
  proto.set_requests(info.hits);
  proto.set_loaded_at_unix_us(info.loaded_at_unix_us);
  proto.set_last_used_unix_us(info.last_used_unix_us);
  for (const std::string& warning : info.warnings) proto.add_warnings(warning);
  return proto;
}

v1::AdapterEvent ToProto(const AdapterEvent& event) {
  v1::AdapterEvent proto;
  switch (event.kind) {
    case AdapterEvent::Kind::kRegistered:
      proto.set_kind(v1::AdapterEvent::KIND_REGISTERED);
      break;
    case AdapterEvent::Kind::kUnloaded:
      proto.set_kind(v1::AdapterEvent::KIND_UNLOADED);
      break;
    case AdapterEvent::Kind::kInHost:
      proto.set_kind(v1::AdapterEvent::KIND_IN_HOST);
      break;
    case AdapterEvent::Kind::kEvicted:
      proto.set_kind(v1::AdapterEvent::KIND_EVICTED);
      break;
    case AdapterEvent::Kind::kFreed:
      proto.set_kind(v1::AdapterEvent::KIND_FREED);
      break;
  }
  proto.set_name(event.name);
  proto.set_version(event.version);
  proto.set_time_unix_us(event.time_unix_us);
  return proto;
}

}  // namespace lorikeet
