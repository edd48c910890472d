// Threads that split short loops: a decode step forks and joins a few hundred times, so workers
// spin for a moment between loops before they sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace lorikeet {

// One caller thread at a time.
class ThreadPool {
 public:
  // `threads` in total, the caller included; at least 1.
  explicit ThreadPool(int32_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t threads() const { return static_cast<int32_t>(workers_.size()) + 1; }

  // fn(task, thread) for task in [0, tasks); returns when all are done. Tasks are claimed one by
  // one, so uneven tasks or a disturbed core do not hold the others up. `thread` in [0, threads).
  template <typename Fn>
  void ParallelFor(int32_t tasks, const Fn& fn) {
    Run(tasks, [](const void* f, int32_t task, int32_t thread) {
          (*static_cast<const Fn*>(f))(task, thread);
        }, &fn);
  }

 private:
  using Body = void (*)(const void* fn, int32_t task, int32_t thread);

  void Run(int32_t tasks, Body body, const void* fn);
  // Runs tasks of loop `epoch` until none is left to claim.
  void Drain(uint32_t epoch, int32_t thread);
  void WorkerLoop(int32_t thread);

  // The current loop: epoch (24 bits), task count (20), next task (20). One word, so that a claim
  // can only succeed on the loop it was meant for.
  std::atomic<uint64_t> state_{0};
  std::atomic<int32_t> done_{0};
  std::atomic<int32_t> sleepers_{0};
  std::atomic<uint32_t> epoch_{0};  // what sleepers wait on
  std::atomic<bool> stop_{false};
  Body body_ = nullptr;       // of the current loop; read only under a claim
  const void* fn_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace lorikeet
