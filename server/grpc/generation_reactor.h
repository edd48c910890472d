// What gRPC's calls of one generation share: starting, being woken, being cancelled.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>

#include "server/generation.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

// The call's deadline on the engine's clock.
int64_t DeadlineMicros(const grpc::ServerContextBase& call, const Clock& clock);

// Lives until gRPC is done with it; `mutex_` guards everything below it.
class GenerationReactor : public std::enable_shared_from_this<GenerationReactor> {
 public:
  virtual ~GenerationReactor() = default;

  // `decode` makes the input of the call's request, for a client that may generate.
  void Start(const ServingContext& context, FrontThread* front,
             const grpc::ServerContextBase& call,
             const std::function<absl::StatusOr<GenerationInput>()>& decode);

 protected:
  // Sends on what Poll gives. With the mutex held.
  virtual void Pump() = 0;
  // gRPC's Finish.
  virtual void FinishCall(const grpc::Status& status) = 0;

  // Ends the call with an error. With the mutex held.
  void Fail(const absl::Status& status);
  void CancelCall();
  void Keep() { self_ = shared_from_this(); }
  void Forget() { self_.reset(); }  // gRPC is done with it

  std::mutex mutex_;
  std::unique_ptr<GenerationCall> generation_;
  bool canceled_ = false;
  bool finished_ = false;  // the call's last operation was started

 private:
  absl::StatusOr<std::unique_ptr<GenerationCall>> TryStart(
      const ServingContext& context, FrontThread* front, const grpc::ServerContextBase& call,
      const std::function<absl::StatusOr<GenerationInput>()>& decode);
  void Wake(std::shared_ptr<GenerationReactor> self, FrontThread* front);

  std::shared_ptr<GenerationReactor> self_;  // until gRPC is done
  std::atomic<bool> posted_{false};
};

// A call whose answer is one message.
class UnaryGeneration : public GenerationReactor, public grpc::ServerUnaryReactor {
 public:
  void OnCancel() final { CancelCall(); }
  void OnDone() final { Forget(); }

 protected:
  // Adds what is new to the message, which is whole after `delta.last`. An error ends the call. With
  // the mutex held.
  virtual absl::Status Take(const GenerationDelta& delta) = 0;

 private:
  void Pump() final;
  void FinishCall(const grpc::Status& status) final { Finish(status); }
};

}  // namespace lorikeet
