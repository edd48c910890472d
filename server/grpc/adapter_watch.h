// WatchAdapters: one reader of the registry's changes.
#pragma once

#include <memory>
#include <mutex>

#include "adapters_cache/registry.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/adapter_admin.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

class AdapterWatchCall final : public grpc::ServerWriteReactor<v1::AdapterEvent>,
                               public std::enable_shared_from_this<AdapterWatchCall> {
 public:
  // Lives until gRPC is done with it; ends at once if there is no client who may. Events are read on `front`, which outlives it.
  static AdapterWatchCall* Start(const AdapterAdmin* admin, const absl::StatusOr<Client>& client,
                                 FrontThread* front);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { self_.reset(); }

 private:
  void Pump();
  void End(const absl::Status& status);  // with the mutex held

  std::shared_ptr<AdapterWatchCall> self_;  // until gRPC is done
  std::mutex mutex_;                        // everything below
  std::unique_ptr<AdapterWatch> watch_;
  v1::AdapterEvent message_;  // under way
  bool writing_ = false;
  bool finished_ = false;
};

}  // namespace lorikeet
