// lorikeet.v1.AdapterService on the callback API; the work is AdapterAdmin's.
#pragma once

#include <boost/asio/thread_pool.hpp>

#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/adapter_admin.h"
#include "server/auth/access.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

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
  // All outlive the server this is registered with.
  AdapterServiceImpl(AdapterAdmin* admin, Access* access, FrontThread* front)
      : admin_(admin), access_(access), front_(front) {}

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
  static constexpr int kUploadThreads = 4;

  AdapterAdmin* const admin_;
  Access* const access_;
  FrontThread* const front_;
  boost::asio::thread_pool uploads_{kUploadThreads};  // wait for the disk in gRPC's threads' place
};

}  // namespace lorikeet
