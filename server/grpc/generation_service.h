// lorikeet.v1.GenerationService.
//
// The engine thread only posts to the front thread, which detokenises, serialises and writes. At most
// one write of a stream is under way, and tokens that arrive meanwhile go into the next message, so a
// slow reader costs no memory beyond its token ring.
//
// Generate has a message a token. Its calls come to a queue of our own and are written on the front
// thread's: the callback API, which the other methods have, wakes another thread for each message
// that has left.
#pragma once

#include <grpcpp/completion_queue.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "lorikeet/v1/generation.grpc.pb.h"
#include "server/generation.h"
#include "server/grpc/front_thread.h"

namespace lorikeet {

class GenerationServiceImpl final
    : public v1::GenerationService::WithRawMethod_Generate<
          v1::GenerationService::WithRawCallbackMethod_GenerateUnary<
              v1::GenerationService::WithCallbackMethod_Embed<
                  v1::GenerationService::WithCallbackMethod_GetModel<
                      v1::GenerationService::Service>>>> {
 public:
  // Both outlive the server this is registered with.
  GenerationServiceImpl(const ServingContext* context, FrontThread* front)
      : context_(context), front_(front) {}

  // Takes calls of Generate from now on. `calls` is the running server's.
  void Serve(std::unique_ptr<grpc::ServerCompletionQueue> calls);
  // Once the server has shut down; returns when the last call of Generate is gone.
  void Stop();

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
  class StreamCall;

  void AcceptStream();
  void CountStreams(int change);

  const ServingContext* const context_;
  FrontThread* const front_;
  std::unique_ptr<grpc::ServerCompletionQueue> calls_;
  std::vector<std::thread> threads_;  // take calls, tokenise and submit
  std::mutex mutex_;
  std::condition_variable gone_;
  int streams_ = 0;  // calls of Generate, with the one that is waited for
};

}  // namespace lorikeet
