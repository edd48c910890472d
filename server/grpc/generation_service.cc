#include "server/grpc/generation_service.h"

#include <atomic>
#include <chrono>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>

#include "engine/base/status_macros.h"
#include "server/grpc/admit.h"
#include "server/grpc/convert.h"
#include "server/grpc/wire.h"
#include "server/version.h"

namespace lorikeet {
namespace {

// The call's deadline on the engine's clock.
int64_t DeadlineMicros(const grpc::CallbackServerContext& call, const Clock& clock) {
  const auto deadline = call.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) {
    return std::numeric_limits<int64_t>::max();
  }
  const auto left = std::chrono::duration_cast<std::chrono::microseconds>(
                        deadline - std::chrono::system_clock::now())
                        .count();
  const int64_t now = clock.NowMicros();
  return left > std::numeric_limits<int64_t>::max() - now ? std::numeric_limits<int64_t>::max()
                                                          : now + left;
}

std::string Metadata(const grpc::CallbackServerContext& call, const char* key) {
  const auto found = call.client_metadata().find(key);
  if (found == call.client_metadata().end()) return {};
  return std::string(found->second.data(), found->second.size());
}

// What the two forms of the call share: starting, being woken, being cancelled. Lives until gRPC
// is done with it; `mutex_` guards everything below it.
class CallBase : public std::enable_shared_from_this<CallBase> {
 public:
  virtual ~CallBase() = default;

  void Start(const ServingContext& context, FrontThread* front, grpc::CallbackServerContext* call,
             const grpc::ByteBuffer& bytes) {
    std::lock_guard lock(mutex_);
    auto started = TryStart(context, front, *call, bytes);
    if (started.ok()) {
      generation_ = *std::move(started);
    } else {
      Fail(started.status());
    }
  }

 protected:
  // Sends on what Poll gives. With the mutex held.
  virtual void Pump() = 0;
  // Ends the call with an error. With the mutex held.
  virtual void Fail(const absl::Status& status) = 0;

  void CancelCall() {
    std::lock_guard lock(mutex_);
    canceled_ = true;
    if (generation_) generation_->Cancel();
    Pump();
  }

  std::mutex mutex_;
  std::unique_ptr<GenerationCall> generation_;
  bool canceled_ = false;
  bool finished_ = false;  // the call's last operation was started

 private:
  absl::StatusOr<std::unique_ptr<GenerationCall>> TryStart(const ServingContext& context,
                                                           FrontThread* front,
                                                           const grpc::CallbackServerContext& call,
                                                           const grpc::ByteBuffer& bytes) {
    LK_ASSIGN_OR_RETURN(const Client client, AdmitCall(*context.access, call, Role::kGenerate));
    v1::GenerateRequest request;
    LK_RETURN_IF_ERROR(DecodeRequest(bytes, &request));
    LK_ASSIGN_OR_RETURN(GenerationInput input, ToInput(std::move(request)));
    input.deadline_us = DeadlineMicros(call, *context.clock);
    input.origin = MakeOrigin(Metadata(call, "x-request-id"), Metadata(call, "traceparent"));
    return GenerationCall::Start(context, *client.caller, std::move(input),
                                 [weak = weak_from_this(), front] {
                                   if (auto self = weak.lock()) self->Wake(std::move(self), front);
                                 });
  }

  // Engine thread. One posted pump takes all events that are there by then.
  void Wake(std::shared_ptr<CallBase> self, FrontThread* front) {
    if (posted_.exchange(true)) return;
    front->Post([self = std::move(self)] {
      self->posted_ = false;
      std::lock_guard lock(self->mutex_);
      self->Pump();
    });
  }

  std::atomic<bool> posted_{false};
};

class StreamCall final : public CallBase, public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  static StreamCall* Make() {
    auto call = std::make_shared<StreamCall>();
    call->self_ = call;
    return call.get();
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mutex_);
    writing_ = false;
    if (!ok) canceled_ = true;
    Pump();
  }
  void OnCancel() override { CancelCall(); }
  void OnDone() override { self_.reset(); }

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

  void Fail(const absl::Status& status) override {
    finished_ = true;
    generation_.reset();
    Finish(ToGrpcStatus(status));
  }

  std::shared_ptr<CallBase> self_;  // until gRPC is done
  grpc::ByteBuffer message_;        // under way
  bool writing_ = false;
};

class UnaryCall final : public CallBase, public grpc::ServerUnaryReactor {
 public:
  static UnaryCall* Make(grpc::ByteBuffer* response) {
    auto call = std::make_shared<UnaryCall>();
    call->self_ = call;
    call->bytes_ = response;
    return call.get();
  }

  void OnCancel() override { CancelCall(); }
  void OnDone() override { self_.reset(); }

 private:
  void Pump() override {
    if (finished_ || !generation_) return;
    if (canceled_) return Fail(absl::CancelledError("the client closed the call"));
    while (true) {
      const GenerationDelta delta = generation_->Poll();
      if (delta.empty()) return;
      if (delta.end && !delta.end->status.ok()) return Fail(delta.end->status);
      AppendDelta(delta, ResponseOf(delta.choice));
      if (delta.last) break;
    }
    finished_ = true;
    *bytes_ = EncodeResponse(response_);
    Finish(grpc::Status::OK);
  }

  void Fail(const absl::Status& status) override {
    finished_ = true;
    generation_.reset();
    Finish(ToGrpcStatus(status));
  }

  v1::GenerateResponse* ResponseOf(int32_t choice) {
    if (choice == 0) return &response_;
    while (response_.more_choices_size() < choice) response_.add_more_choices();
    return response_.mutable_more_choices(choice - 1);
  }

  std::shared_ptr<CallBase> self_;     // until gRPC is done
  grpc::ByteBuffer* bytes_ = nullptr;  // gRPC's, valid until Finish
  v1::GenerateResponse response_;      // so far
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerationServiceImpl::Generate(
    grpc::CallbackServerContext* call, const grpc::ByteBuffer* request) {
  StreamCall* stream = StreamCall::Make();
  stream->Start(*context_, front_, call, *request);
  return stream;
}

grpc::ServerUnaryReactor* GenerationServiceImpl::GenerateUnary(grpc::CallbackServerContext* call,
                                                               const grpc::ByteBuffer* request,
                                                               grpc::ByteBuffer* response) {
  UnaryCall* unary = UnaryCall::Make(response);
  unary->Start(*context_, front_, call, *request);
  return unary;
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
  response->set_vocab_size(context_->vocab_size);
  response->set_max_context_tokens(context_->max_context_tokens);
  response->set_has_chat_template(context_->chat_template != nullptr);
  response->set_server_version(kVersion);
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace lorikeet
