#include "server/grpc/generation_service.h"

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/base/status_macros.h"
#include "server/grpc/admit.h"
#include "server/grpc/convert.h"
#include "server/grpc/generation_reactor.h"
#include "server/grpc/wire.h"
#include "server/version.h"

namespace lorikeet {
namespace {

absl::StatusOr<GenerationInput> Decode(const grpc::ByteBuffer& bytes) {
  v1::GenerateRequest request;
  LK_RETURN_IF_ERROR(DecodeRequest(bytes, &request));
  return ToInput(std::move(request));
}

class StreamCall final : public GenerationReactor,
                         public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mutex_);
    writing_ = false;
    if (!ok) canceled_ = true;
    Pump();
  }
  void OnCancel() override { CancelCall(); }
  void OnDone() override { Forget(); }

 private:
  void Pump() override {
    if (finished_ || writing_ || !generation_) return;
    if (canceled_) return Fail(absl::CancelledError("the client closed the call"));
    const GenerationDelta delta = generation_->Poll();
    if (delta.empty()) return;
    if (delta.end && !delta.end->status.ok()) return Fail(delta.end->status);
    v1::GenerateResponse response;
    AppendDelta(delta, &response);
    message_ = EncodeResponse(response);
    if (delta.last) {
      finished_ = true;
      StartWriteAndFinish(&message_, grpc::WriteOptions(), grpc::Status::OK);
    } else {
      writing_ = true;
      StartWrite(&message_);
    }
  }

  void FinishCall(const grpc::Status& status) override { Finish(status); }

  grpc::ByteBuffer message_;  // under way
  bool writing_ = false;
};

class UnaryCall final : public UnaryGeneration {
 public:
  explicit UnaryCall(grpc::ByteBuffer* bytes) : bytes_(bytes) {}

 private:
  absl::Status Take(const GenerationDelta& delta) override {
    AppendDelta(delta, ResponseOf(delta.choice));
    if (delta.last) *bytes_ = EncodeResponse(response_);
    return absl::OkStatus();
  }

  v1::GenerateResponse* ResponseOf(int32_t choice) {
    if (choice == 0) return &response_;
    while (response_.more_choices_size() < choice) response_.add_more_choices();
    return response_.mutable_more_choices(choice - 1);
  }

  grpc::ByteBuffer* const bytes_;  // gRPC's, valid until Finish
  v1::GenerateResponse response_;  // so far
};

class EmbedCall final : public UnaryGeneration {
 public:
  // `response`: gRPC's, valid until Finish.
  EmbedCall(int32_t dimensions, v1::EmbedResponse* response)
      : dimensions_(dimensions), response_(response) {}

 private:
  absl::Status Take(const GenerationDelta& delta) override {
    if (!delta.end) return absl::OkStatus();
    LK_ASSIGN_OR_RETURN(const std::vector<float> unit, delta.end->embedding->Unit(dimensions_));
    response_->mutable_values()->Add(unit.begin(), unit.end());
    SetUsage(*delta.end, response_->mutable_usage());
    response_->set_adapter_version(delta.end->adapter_version);
    return absl::OkStatus();
  }

  const int32_t dimensions_;
  v1::EmbedResponse* const response_;
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerationServiceImpl::Generate(
    grpc::CallbackServerContext* call, const grpc::ByteBuffer* request) {
  const auto stream = std::make_shared<StreamCall>();
  stream->Start(*context_, front_, call, [request] { return Decode(*request); });
  return stream.get();
}

grpc::ServerUnaryReactor* GenerationServiceImpl::GenerateUnary(grpc::CallbackServerContext* call,
                                                               const grpc::ByteBuffer* request,
                                                               grpc::ByteBuffer* response) {
  const auto unary = std::make_shared<UnaryCall>(response);
  unary->Start(*context_, front_, call, [request] { return Decode(*request); });
  return unary.get();
}

grpc::ServerUnaryReactor* GenerationServiceImpl::Embed(grpc::CallbackServerContext* call,
                                                       const v1::EmbedRequest* request,
                                                       v1::EmbedResponse* response) {
  const int32_t all = context_->hidden_size;
  const int32_t dimensions = request->dimensions() == 0 ? all : request->dimensions();
  const auto unary = std::make_shared<EmbedCall>(dimensions, response);
  unary->Start(*context_, front_, call, [&] { return ToInput(*request, all); });
  return unary.get();
}

grpc::ServerUnaryReactor* GenerationServiceImpl::GetModel(grpc::CallbackServerContext* call,
                                                          const v1::GetModelRequest*,
                                                          v1::GetModelResponse* response) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  const absl::Status admitted = AdmitCall(*context_->access, *call, std::nullopt).status();
  if (!admitted.ok()) {
    reactor->Finish(ToGrpcStatus(admitted));
    return reactor;
  }
  response->set_name(context_->model_name);
  response->set_vocab_size(context_->text.vocab_size);
  response->set_max_context_tokens(context_->max_context_tokens);
  response->set_has_chat_template(context_->text.chat_template != nullptr);
  response->set_server_version(kVersion);
  response->set_hidden_size(context_->hidden_size);
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace lorikeet
