// lorikeet.v1.AdapterService on the callback API; the work is the registry's, on its threads.
#pragma once

#include <chrono>

#include "adapters_cache/registry.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/metrics.h"

namespace lorikeet {

class AdapterServiceImpl final : public v1::AdapterService::WithRawCallbackMethod_LoadAdapter<
                                     v1::AdapterService::WithRawCallbackMethod_UnloadAdapter<
                                         v1::AdapterService::WithRawCallbackMethod_GetAdapter<
                                             v1::AdapterService::WithCallbackMethod_ListAdapters<
                                                 v1::AdapterService::Service>>>> {
 public:
  // `registry` and `metrics` outlive the server this is registered with. `drain` bounds how long
  // an unload waits when its call has no earlier deadline.
  AdapterServiceImpl(AdapterRegistry* registry, Metrics* metrics, std::chrono::microseconds drain)
      : registry_(registry), metrics_(metrics), drain_(drain) {}

  grpc::ServerUnaryReactor* LoadAdapter(grpc::CallbackServerContext* call,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* UnloadAdapter(grpc::CallbackServerContext* call,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetAdapter(grpc::CallbackServerContext* call,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ListAdapters(grpc::CallbackServerContext* call,
                                         const v1::ListAdaptersRequest* request,
                                         v1::ListAdaptersResponse* response) override;

 private:
  AdapterRegistry* registry_;
  Metrics* metrics_;
  std::chrono::microseconds drain_;
};

}  // namespace lorikeet
