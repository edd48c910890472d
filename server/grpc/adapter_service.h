// lorikeet.v1.AdapterService on the callback API; the work is the registry's, on its threads.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>

#include "adapters_cache/registry.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/grpc/front_thread.h"
#include "server/grpc/plan_capacity.h"
#include "server/metrics.h"

namespace lorikeet {

struct AdapterServiceOptions {
  std::chrono::microseconds drain{0};  // of an unload whose call has no earlier deadline
  std::filesystem::path directory;     // where uploaded adapters are kept; empty: nowhere
  Capacity capacity;
};

class AdapterServiceImpl final
    : public v1::AdapterService::WithRawCallbackMethod_LoadAdapter<
          v1::AdapterService::WithRawCallbackMethod_UploadAdapter<
              v1::AdapterService::WithRawCallbackMethod_ReloadAdapter<
                  v1::AdapterService::WithRawCallbackMethod_UnloadAdapter<
                      v1::AdapterService::WithRawCallbackMethod_ListAdapters<
                          v1::AdapterService::WithRawCallbackMethod_GetAdapter<
                              v1::AdapterService::WithRawCallbackMethod_PinAdapter<
                                  v1::AdapterService::WithRawCallbackMethod_PrefetchAdapter<
                                      v1::AdapterService::WithRawCallbackMethod_SetAlias<
                                          v1::AdapterService::WithCallbackMethod_WatchAdapters<
                                              v1::AdapterService::WithRawCallbackMethod_PlanCapacity<
                                                  v1::AdapterService::Service>>>>>>>>>>> {
 public:
  // `registry`, `metrics` and `front` outlive the server this is registered with.
  AdapterServiceImpl(AdapterRegistry* registry, Metrics* metrics, FrontThread* front,
                     AdapterServiceOptions options)
      : registry_(registry), metrics_(metrics), front_(front), options_(std::move(options)) {}

  using Call = grpc::CallbackServerContext;
  using Bytes = grpc::ByteBuffer;
  using Unary = grpc::ServerUnaryReactor;
  Unary* LoadAdapter(Call* call, const Bytes* request, Bytes* response) override;
  grpc::ServerReadReactor<Bytes>* UploadAdapter(Call* call, Bytes* response) override;
  Unary* ReloadAdapter(Call* call, const Bytes* request, Bytes* response) override;
  Unary* UnloadAdapter(Call* call, const Bytes* request, Bytes* response) override;
  Unary* ListAdapters(Call* call, const Bytes* request, Bytes* response) override;
  Unary* GetAdapter(Call* call, const Bytes* request, Bytes* response) override;
  Unary* PinAdapter(Call* call, const Bytes* request, Bytes* response) override;
  Unary* PrefetchAdapter(Call* call, const Bytes* request, Bytes* response) override;
  Unary* SetAlias(Call* call, const Bytes* request, Bytes* response) override;
  grpc::ServerWriteReactor<v1::AdapterEvent>* WatchAdapters(
      Call* call, const v1::WatchAdaptersRequest* request) override;
  Unary* PlanCapacity(Call* call, const Bytes* request, Bytes* response) override;

 private:
  AdapterRegistry::LoadDone FinishLoad(Unary* reactor, Bytes* response);

  AdapterRegistry* registry_;
  Metrics* metrics_;
  FrontThread* front_;
  AdapterServiceOptions options_;
};

}  // namespace lorikeet
