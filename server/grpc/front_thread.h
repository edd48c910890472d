// The thread that turns token events into messages, so that the engine thread does not: it only
// queues a piece of work here and goes on. Operations started on `queue()` end on this thread as
// well: a stream's message wakes no other.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/completion_queue.h>

#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lorikeet {

// What is done when an operation of gRPC has ended. An operation's tag is a pointer to one that
// lives until then.
using Completion = std::function<void(bool ok)>;

// Until the queue is shut down and empty.
void RunCompletions(grpc::CompletionQueue* queue);

class FrontThread {
 public:
  FrontThread();
  // Runs what was posted and what ends of what was started, then ends. Nothing may be started on
  // queue() from now on.
  ~FrontThread();

  // Any thread. One wake-up covers all that is posted before the thread gets to it.
  void Post(std::function<void()> work);

  grpc::CompletionQueue* queue() { return &queue_; }

 private:
  void RunPosted();

  grpc::CompletionQueue queue_;
  grpc::Alarm alarm_;  // wakes the thread: set while there is something posted
  Completion on_alarm_ = [this](bool) { RunPosted(); };
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;
  bool closed_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace lorikeet
