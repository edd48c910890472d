#include "server/grpc/generation_reactor.h"

#include <chrono>
#include <limits>
#include <utility>

#include "engine/base/status_macros.h"
#include "server/grpc/admit.h"
#include "server/grpc/wire.h"

namespace lorikeet {

int64_t DeadlineMicros(const grpc::ServerContextBase& call, const Clock& clock) {
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

void GenerationReactor::Start(const ServingContext& context, FrontThread* front,
                              const grpc::ServerContextBase& call,
                              const std::function<absl::StatusOr<GenerationInput>()>& decode) {
  Keep();
  auto started = TryStart(context, front, call, decode);
  std::lock_guard lock(mutex_);
  if (!started.ok()) return Fail(started.status());
  generation_ = *std::move(started);
  Pump();  // what came meanwhile
}

absl::StatusOr<std::unique_ptr<GenerationCall>> GenerationReactor::TryStart(
    const ServingContext& context, FrontThread* front, const grpc::ServerContextBase& call,
    const std::function<absl::StatusOr<GenerationInput>()>& decode) {
  LK_ASSIGN_OR_RETURN(const Client client, AdmitCall(*context.access, call, Role::kGenerate));
  LK_ASSIGN_OR_RETURN(GenerationInput input, decode());
  input.deadline_us = DeadlineMicros(call, *context.clock);
  input.origin = OriginOf(call);
  return GenerationCall::Start(context, *client.caller, std::move(input),
                               [weak = weak_from_this(), front] {
                                 if (auto self = weak.lock()) self->Wake(std::move(self), front);
                               });
}

void GenerationReactor::Fail(const absl::Status& status) {
  finished_ = true;
  generation_.reset();
  FinishCall(ToGrpcStatus(status));
}

void GenerationReactor::CancelCall() {
  std::lock_guard lock(mutex_);
  canceled_ = true;
  if (generation_) generation_->Cancel();
  Pump();
}

// Engine thread. One posted pump takes all events that are there by then.
void GenerationReactor::Wake(std::shared_ptr<GenerationReactor> self, FrontThread* front) {
  if (posted_.exchange(true)) return;
  front->Post([self = std::move(self)] {
    self->posted_ = false;
    std::lock_guard lock(self->mutex_);
    self->Pump();
  });
}

void UnaryGeneration::Pump() {
  if (finished_ || !generation_) return;
  if (canceled_) return Fail(absl::CancelledError("the client closed the call"));
  while (!finished_) {
    const GenerationDelta delta = generation_->Poll();
    if (delta.empty()) return;
    if (delta.end && !delta.end->status.ok()) return Fail(delta.end->status);
    const absl::Status taken = Take(delta);
    if (!taken.ok()) return Fail(taken);
    finished_ = delta.last;
  }
  Finish(grpc::Status::OK);
}

}  // namespace lorikeet
