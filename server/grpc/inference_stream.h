// ModelStreamInfer: any number of requests on one stream, answered side by side.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "inference/inference.grpc.pb.h"
#include "server/generation.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

class InferenceStream final
    : public grpc::ServerBidiReactor<inference::ModelInferRequest,
                                     inference::ModelStreamInferResponse>,
      public std::enable_shared_from_this<InferenceStream> {
 public:
  // Lives until gRPC is done with it. All outlive it.
  static InferenceStream* Start(const ServingContext* context, FrontThread* front,
                                grpc::CallbackServerContext* call);
  InferenceStream(const ServingContext* context, FrontThread* front,
                  grpc::CallbackServerContext* call)
      : context_(context), front_(front), call_(call) {}

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { self_.reset(); }

 private:
  static constexpr size_t kMaxOpen = 256;  // requests; more wait in the client

  struct Open {
    inference::ModelInferResponse head;
    bool pieces = true;                   // else one response, at the end
    std::vector<GenerationDelta> wholes;  // [choices] so far, without pieces
    std::unique_ptr<GenerationCall> generation;
    absl::Status failed;  // before it began; to be sent
  };

  // With the mutex held:
  absl::Status Begin(Open* open);
  void Pump();
  bool Next(Open* open, bool* done);
  bool TakeDelta(Open* open, GenerationDelta delta, bool* done);
  void SendError(const Open& open, const absl::Status& status);
  void End(const absl::Status& status);
  void Wake();

  const ServingContext* const context_;
  FrontThread* const front_;
  grpc::CallbackServerContext* const call_;
  std::shared_ptr<InferenceStream> self_;  // until gRPC is done
  std::atomic<bool> posted_{false};
  std::mutex mutex_;  // everything below
  inference::ModelInferRequest request_;         // being read
  inference::ModelStreamInferResponse message_;  // being written
  std::vector<std::unique_ptr<Open>> open_;
  size_t next_ = 0;  // to poll
  bool reading_ = false;
  bool writing_ = false;
  bool half_closed_ = false;
  bool finished_ = false;
};

}  // namespace lorikeet
