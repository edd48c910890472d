#include "server/grpc/inference_stream.h"

#include <utility>

#include "engine/base/status_macros.h"
#include "server/grpc/admit.h"
#include "server/grpc/generation_reactor.h"
#include "server/grpc/inference_convert.h"
#include "server/grpc/wire.h"

namespace lorikeet {

InferenceStream* InferenceStream::Start(const ServingContext* context, FrontThread* front,
                                        grpc::CallbackServerContext* call) {
  auto stream = std::make_shared<InferenceStream>(context, front, call);
  stream->self_ = stream;
  std::lock_guard lock(stream->mutex_);
  stream->reading_ = true;
  stream->StartRead(&stream->request_);
  return stream.get();
}

void InferenceStream::OnReadDone(bool ok) {
  std::lock_guard lock(mutex_);
  reading_ = false;
  if (finished_ || canceled_) return;
  if (ok) {
    auto open = std::make_unique<Open>();
    open->failed = Begin(open.get());
    open_.push_back(std::move(open));
  } else {
    half_closed_ = true;
  }
  Pump();
}

absl::Status InferenceStream::Begin(Open* open) {
  open->head = ResponseTo(request_);
  LK_ASSIGN_OR_RETURN(const Client client,
                      AdmitCall(*context_->access, *call_, Role::kGenerate));
  LK_ASSIGN_OR_RETURN(GenerationInput input, ToInput(request_, &open->pieces));
  input.deadline_us = DeadlineMicros(*call_, *context_->clock);
  input.origin = OriginOf(*call_);
  open->wholes.resize(input.choices);
  LK_ASSIGN_OR_RETURN(open->generation,
                      GenerationCall::Start(*context_, *client.caller, std::move(input),
                                            [weak = weak_from_this()] {
                                              if (const auto self = weak.lock()) self->Wake();
                                            }));
  return absl::OkStatus();
}

// Engine thread. One posted pump takes all events that are there by then.
void InferenceStream::Wake() {
  if (posted_.exchange(true)) return;
  front_->Post([self = shared_from_this()] {
    self->posted_ = false;
    std::lock_guard lock(self->mutex_);
    self->Pump();
  });
}

void InferenceStream::Pump() {
  if (finished_ || writing_ || canceled_) return;
  for (size_t tries = open_.size(); tries > 0 && !writing_; --tries) {
    next_ %= open_.size();
    bool done = false;
    writing_ = Next(open_[next_].get(), &done);
    if (done) {
      open_.erase(open_.begin() + static_cast<ptrdiff_t>(next_));
    } else {
      ++next_;
    }
  }
  if (!half_closed_ && !reading_ && open_.size() < kMaxOpen) {
    reading_ = true;
    StartRead(&request_);
  }
  if (writing_) return StartWrite(&message_);
  if (half_closed_ && open_.empty()) End(absl::OkStatus());
}

// Makes `message_` the next one of a request, if there is one.
bool InferenceStream::Next(Open* open, bool* done) {
  if (!open->failed.ok()) {
    *done = true;
    SendError(*open, open->failed);
    return true;
  }
  while (true) {
    GenerationDelta delta = open->generation->Poll();
    if (delta.empty()) return false;
    if (TakeDelta(open, std::move(delta), done)) return true;
  }
}

bool InferenceStream::TakeDelta(Open* open, GenerationDelta delta, bool* done) {
  *done = delta.last;
  if (delta.end && !delta.end->status.ok()) {
    SendError(*open, delta.end->status);
    return true;
  }
  const bool last = delta.last;
  std::vector<std::string> texts = {delta.text};
  GenerationEnd end = delta.end.value_or(GenerationEnd());
  const bool ended = delta.end.has_value();
  const int32_t choice = delta.choice;
  if (!open->pieces) {
    open->wholes[choice].Append(std::move(delta));
    if (!last) return false;
    texts.clear();
    for (const GenerationDelta& whole : open->wholes) texts.push_back(whole.text);
  } else if (texts[0].empty() && !ended) {
    return false;
  }
  message_.Clear();
  inference::ModelInferResponse* response = message_.mutable_infer_response();
  *response = open->head;
  SetTexts(texts, response);
  auto& parameters = *response->mutable_parameters();
  if (open->pieces && open->wholes.size() > 1) parameters["choice"].set_int64_param(choice);
  parameters["triton_final_response"].set_bool_param(last);
  if (ended) SetEnd(end, response);
  return true;
}

void InferenceStream::SendError(const Open& open, const absl::Status& status) {
  message_.Clear();
  message_.set_error_message(std::string(status.message()));
  *message_.mutable_infer_response() = open.head;
  (*message_.mutable_infer_response()->mutable_parameters())["triton_final_response"]
      .set_bool_param(true);
}

void InferenceStream::OnWriteDone(bool ok) {
  std::lock_guard lock(mutex_);
  writing_ = false;
  if (!ok || canceled_) return End(absl::CancelledError("the client closed the call"));
  Pump();
}

void InferenceStream::OnCancel() {
  std::lock_guard lock(mutex_);
  canceled_ = true;
  open_.clear();  // which stops their work
  if (!writing_) End(absl::CancelledError("the client closed the call"));
}

void InferenceStream::End(const absl::Status& status) {
  if (std::exchange(finished_, true)) return;
  Finish(ToGrpcStatus(status));
}

}  // namespace lorikeet
