#include "server/grpc/generation_service.h"

#include <algorithm>
#include <atomic>
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

// A call of Generate, or the wait for one.
class GenerationServiceImpl::StreamCall final : public GenerationReactor {
 public:
  explicit StreamCall(GenerationServiceImpl* service) : service_(*service) {
    service_.CountStreams(+1);
  }
  ~StreamCall() override {
    generation_.reset();
    service_.CountStreams(-1);
  }

  void Wait() {
    Keep();
    call_.AsyncNotifyWhenDone(&ended_);
    service_.RequestGenerate(&call_, &request_, &writer_, service_.front_->queue(),
                             service_.calls_.get(), &came_);
  }

 private:
  void OnCame(bool ok) {
    if (!ok) return Forget();  // none will: the server shuts down
    service_.AcceptStream();
    Start(*service_.context_, service_.front_, call_, [this] { return Decode(request_); });
    Release();
  }

  void OnWritten(bool ok) {
    {
      std::lock_guard lock(mutex_);
      writing_ = false;
      if (!ok) canceled_ = true;
      Pump();
    }
    Release();
  }

  void OnEnded() {
    if (call_.IsCancelled()) CancelCall();
    Release();
  }

  // An operation has ended, and gRPC is done with the call after the last one.
  void Release() {
    if (--pending_ == 0) Forget();
  }

  void Pump() override {
    if (finished_ || writing_ || !generation_) return;
    if (canceled_) return Fail(absl::CancelledError("the client closed the call"));
    const GenerationDelta delta = generation_->Poll();
    if (delta.empty()) return;
    if (delta.end && !delta.end->status.ok()) return Fail(delta.end->status);
    v1::GenerateResponse response;
    AppendDelta(delta, &response);
    const grpc::ByteBuffer message = EncodeResponse(response);
    ++pending_;
    if (delta.last) {
      finished_ = true;
      writer_.WriteAndFinish(message, grpc::WriteOptions(), grpc::Status::OK, &closed_);
    } else {
      writing_ = true;
      writer_.Write(message, &written_);
    }
  }

  void FinishCall(const grpc::Status& status) override {
    ++pending_;
    writer_.Finish(status, &closed_);
  }

  GenerationServiceImpl& service_;
  grpc::ServerContext call_;
  grpc::ByteBuffer request_;
  grpc::ServerAsyncWriter<grpc::ByteBuffer> writer_{&call_};
  Completion came_ = [this](bool ok) { OnCame(ok); };
  Completion written_ = [this](bool ok) { OnWritten(ok); };
  Completion closed_ = [this](bool) { Release(); };
  Completion ended_ = [this](bool) { OnEnded(); };
  std::atomic<int> pending_{2};  // operations under way: the call's coming and its end
  bool writing_ = false;
};

void GenerationServiceImpl::Serve(std::unique_ptr<grpc::ServerCompletionQueue> calls) {
  calls_ = std::move(calls);
  // As many as gRPC has for its callbacks.
  const unsigned threads = std::clamp(std::thread::hardware_concurrency() / 2, 2u, 16u);
  for (unsigned i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { RunCompletions(calls_.get()); });
  }
  AcceptStream();
}

void GenerationServiceImpl::Stop() {
  if (calls_ == nullptr) return;
  {
    std::unique_lock lock(mutex_);
    gone_.wait(lock, [this] { return streams_ == 0; });
  }
  calls_->Shutdown();
  for (std::thread& thread : threads_) thread.join();
}

void GenerationServiceImpl::CountStreams(int change) {
  std::lock_guard lock(mutex_);
  streams_ += change;
  gone_.notify_all();  // with the mutex held: there may be no service after it
}

void GenerationServiceImpl::AcceptStream() { std::make_shared<StreamCall>(this)->Wait(); }

grpc::ServerUnaryReactor* GenerationServiceImpl::GenerateUnary(grpc::CallbackServerContext* call,
                                                               const grpc::ByteBuffer* request,
                                                               grpc::ByteBuffer* response) {
  const auto unary = std::make_shared<UnaryCall>(response);
  unary->Start(*context_, front_, *call, [request] { return Decode(*request); });
  return unary.get();
}

grpc::ServerUnaryReactor* GenerationServiceImpl::Embed(grpc::CallbackServerContext* call,
                                                       const v1::EmbedRequest* request,
                                                       v1::EmbedResponse* response) {
  const int32_t all = context_->hidden_size;
  const int32_t dimensions = request->dimensions() == 0 ? all : request->dimensions();
  const auto unary = std::make_shared<EmbedCall>(dimensions, response);
  unary->Start(*context_, front_, *call, [&] { return ToInput(*request, all); });
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
