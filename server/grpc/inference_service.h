// inference.GRPCInferenceService, the Open Inference Protocol, over the base model and adapters.
#pragma once

#include "inference/inference.grpc.pb.h"
#include "server/adapter_admin.h"
#include "server/generation.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

class InferenceServiceImpl final : public inference::GRPCInferenceService::CallbackService {
 public:
  // All outlive the server this is registered with.
  InferenceServiceImpl(const ServingContext* context, AdapterAdmin* admin, FrontThread* front)
      : context_(context), admin_(admin), front_(front) {}

  using Call = grpc::CallbackServerContext;
  using Unary = grpc::ServerUnaryReactor;
  Unary* ServerLive(Call* call, const inference::ServerLiveRequest* request,
                    inference::ServerLiveResponse* response) override;
  Unary* ServerReady(Call* call, const inference::ServerReadyRequest* request,
                     inference::ServerReadyResponse* response) override;
  Unary* ServerMetadata(Call* call, const inference::ServerMetadataRequest* request,
                        inference::ServerMetadataResponse* response) override;
  Unary* ModelReady(Call* call, const inference::ModelReadyRequest* request,
                    inference::ModelReadyResponse* response) override;
  Unary* ModelMetadata(Call* call, const inference::ModelMetadataRequest* request,
                       inference::ModelMetadataResponse* response) override;
  Unary* ModelInfer(Call* call, const inference::ModelInferRequest* request,
                    inference::ModelInferResponse* response) override;
  grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
  ModelStreamInfer(Call* call) override;
  Unary* RepositoryIndex(Call* call, const inference::RepositoryIndexRequest* request,
                         inference::RepositoryIndexResponse* response) override;
  Unary* RepositoryModelLoad(Call* call, const inference::RepositoryModelLoadRequest* request,
                             inference::RepositoryModelLoadResponse* response) override;
  Unary* RepositoryModelUnload(Call* call, const inference::RepositoryModelUnloadRequest* request,
                               inference::RepositoryModelUnloadResponse* response) override;

 private:
  absl::Status CheckModel(const Identity& caller, const std::string& name,
                          const std::string& version) const;

  const ServingContext* const context_;
  AdapterAdmin* const admin_;
  FrontThread* const front_;
};

}  // namespace lorikeet
