#include "server/grpc/inference_service.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/base/status_macros.h"
#include "server/generation_request.h"
#include "server/grpc/admit.h"
#include "server/grpc/generation_reactor.h"
#include "server/grpc/inference_convert.h"
#include "server/grpc/inference_stream.h"
#include "server/grpc/wire.h"
#include "server/version.h"

namespace lorikeet {
namespace {

// Admits and ends the call with what `work` says.
grpc::ServerUnaryReactor* Answer(const ServingContext& context, std::optional<Role> role,
                                 grpc::CallbackServerContext* call,
                                 const std::function<absl::Status(const Client&)>& work) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  const absl::StatusOr<Client> client = AdmitCall(*context.access, *call, role);
  reactor->Finish(ToGrpcStatus(client.ok() ? work(*client) : client.status()));
  return reactor;
}

class InferCall final : public UnaryGeneration {
 public:
  InferCall(const inference::ModelInferRequest& request, inference::ModelInferResponse* response)
      : response_(response) {
    *response = ResponseTo(request);
  }

 private:
  absl::Status Take(const GenerationDelta& delta) override {
    texts_.resize(std::max<size_t>(texts_.size(), delta.choice + 1));
    texts_[delta.choice] += delta.text;
    if (delta.end) SetEnd(*delta.end, response_);
    if (delta.last) SetTexts(texts_, response_);
    return absl::OkStatus();
  }

  inference::ModelInferResponse* const response_;  // gRPC's, valid until Finish
  std::vector<std::string> texts_;                 // [choices] so far
};

void Describe(const char* name, inference::ModelMetadataResponse::TensorMetadata* tensor) {
  tensor->set_name(name);
  tensor->set_datatype("BYTES");
  tensor->add_shape(-1);
}

}  // namespace

absl::Status InferenceServiceImpl::CheckModel(const Identity& caller, const std::string& name,
                                              const std::string& version) const {
  return ResolveModel(*context_, caller, version.empty() ? name : name + "@" + version).status();
}

grpc::ServerUnaryReactor* InferenceServiceImpl::ServerLive(
    Call* call, const inference::ServerLiveRequest*, inference::ServerLiveResponse* response) {
  response->set_live(true);
  Unary* reactor = call->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* InferenceServiceImpl::ServerReady(
    Call* call, const inference::ServerReadyRequest*, inference::ServerReadyResponse* response) {
  response->set_ready(context_->engine->device_status().ok());
  Unary* reactor = call->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* InferenceServiceImpl::ServerMetadata(
    Call* call, const inference::ServerMetadataRequest*,
    inference::ServerMetadataResponse* response) {
  return Answer(*context_, std::nullopt, call, [&](const Client&) {
    response->set_name("lorikeet");
    response->set_version(kVersion);
    response->add_extensions("model_repository");
    response->add_extensions("binary_tensor_data");
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::ModelReady(
    Call* call, const inference::ModelReadyRequest* request,
    inference::ModelReadyResponse* response) {
  return Answer(*context_, std::nullopt, call, [&](const Client& client) {
    response->set_ready(CheckModel(*client.caller, request->name(), request->version()).ok());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::ModelMetadata(
    Call* call, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  return Answer(*context_, std::nullopt, call, [&](const Client& client) -> absl::Status {
    LK_RETURN_IF_ERROR(CheckModel(*client.caller, request->name(), request->version()));
    response->set_name(request->name());
    response->set_platform("lorikeet");
    const auto adapter = admin_->Find(*client.caller, request->name());
    if (adapter.ok()) response->add_versions(adapter->version);
    Describe("text_input", response->add_inputs());
    Describe("sampling_parameters", response->add_inputs());
    Describe("text_output", response->add_outputs());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::ModelInfer(
    Call* call, const inference::ModelInferRequest* request,
    inference::ModelInferResponse* response) {
  const auto infer = std::make_shared<InferCall>(*request, response);
  infer->Start(*context_, front_, *call, [request] {
    bool pieces = false;  // there is one response in any case
    return ToInput(*request, &pieces);
  });
  return infer.get();
}

grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
InferenceServiceImpl::ModelStreamInfer(Call* call) {
  return InferenceStream::Start(context_, front_, call);
}

grpc::ServerUnaryReactor* InferenceServiceImpl::RepositoryIndex(
    Call* call, const inference::RepositoryIndexRequest* request,
    inference::RepositoryIndexResponse* response) {
  return Answer(*context_, Role::kAdaptersRead, call, [&](const Client& client) -> absl::Status {
    LK_RETURN_IF_ERROR(CheckRepository(request->repository_name()));
    const auto add = [response](const std::string& name, const std::string& version) {
      auto* model = response->add_models();
      model->set_name(name);
      model->set_version(version);
      model->set_state("READY");
    };
    add(context_->model_name, "");
    for (const AdapterInfo& info : admin_->Visible(*client.caller)) add(info.name, info.version);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::RepositoryModelLoad(
    Call* call, const inference::RepositoryModelLoadRequest* request,
    inference::RepositoryModelLoadResponse*) {
  Unary* reactor = call->DefaultReactor();
  const absl::StatusOr<Client> client =
      AdmitCall(*context_->access, *call, Role::kAdaptersWrite, "RepositoryModelLoad");
  const absl::StatusOr<v1::LoadAdapterRequest> load =
      client.ok() ? ToLoad(*request) : client.status();
  if (!load.ok()) {
    reactor->Finish(ToGrpcStatus(load.status()));
    return reactor;
  }
  admin_->Load(*client, *load, [reactor](const absl::StatusOr<v1::LoadAdapterResponse>& reply) {
    reactor->Finish(ToGrpcStatus(reply.status()));
  });
  return reactor;
}

grpc::ServerUnaryReactor* InferenceServiceImpl::RepositoryModelUnload(
    Call* call, const inference::RepositoryModelUnloadRequest* request,
    inference::RepositoryModelUnloadResponse*) {
  Unary* reactor = call->DefaultReactor();
  const absl::StatusOr<Client> client =
      AdmitCall(*context_->access, *call, Role::kAdaptersWrite, "RepositoryModelUnload");
  const absl::Status good =
      client.ok() ? CheckRepository(request->repository_name()) : client.status();
  if (!good.ok()) {
    reactor->Finish(ToGrpcStatus(good));
    return reactor;
  }
  v1::UnloadAdapterRequest unload;
  unload.set_name(request->model_name());
  admin_->Unload(*client, unload, std::nullopt,
                 [reactor](const absl::StatusOr<v1::UnloadAdapterResponse>& reply) {
                   reactor->Finish(ToGrpcStatus(reply.status()));
                 });
  return reactor;
}

}  // namespace lorikeet
