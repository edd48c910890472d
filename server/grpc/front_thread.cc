#include "server/grpc/front_thread.h"

#include <chrono>
#include <utility>

namespace lorikeet {

void RunCompletions(grpc::CompletionQueue* queue) {
  void* tag = nullptr;
  bool ok = false;
  while (queue->Next(&tag, &ok)) (*static_cast<Completion*>(tag))(ok);
}

FrontThread::FrontThread() : thread_([this] { RunCompletions(&queue_); }) {}

FrontThread::~FrontThread() {
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    queue_.Shutdown();
  }
  thread_.join();
}

void FrontThread::Post(std::function<void()> work) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  if (posted_.empty()) {
    alarm_.Set(&queue_, std::chrono::system_clock::time_point(), &on_alarm_);
  }
  posted_.push_back(std::move(work));
}

void FrontThread::RunPosted() {
  std::vector<std::function<void()>> batch;
  {
    std::lock_guard lock(mutex_);
    batch.swap(posted_);
  }
  for (auto& work : batch) work();
}

}  // namespace lorikeet
