// lorikeet.v1.GenerationService on the callback API.
//
// The engine thread only posts to the front thread; detokenising, serialising and writing happen
// there and on gRPC's threads. At most one write of a stream is under way, and tokens that arrive
// meanwhile go into the next message, so a slow reader costs no memory beyond its token ring.
#pragma once

#include "lorikeet/v1/generation.grpc.pb.h"
#include "server/generation.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

class GenerationServiceImpl final
    : public v1::GenerationService::WithRawCallbackMethod_Generate<
          v1::GenerationService::WithRawCallbackMethod_GenerateUnary<
              v1::GenerationService::WithCallbackMethod_Embed<
                  v1::GenerationService::WithCallbackMethod_GetModel<
                      v1::GenerationService::Service>>>> {
 public:
  // Both outlive the server this is registered with.
  GenerationServiceImpl(const ServingContext* context, FrontThread* front)
      : context_(context), front_(front) {}

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* call,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* GenerateUnary(grpc::CallbackServerContext* call,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Embed(grpc::CallbackServerContext* call,
                                  const v1::EmbedRequest* request,
                                  v1::EmbedResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* call,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;

 private:
  const ServingContext* context_;
  FrontThread* front_;
};

}  // namespace lorikeet
