#include "engine/kernels/thread_pool.h"

#include <immintrin.h>
#include <sched.h>

#include "engine/base/check.h"

namespace lorikeet {
namespace {

constexpr int kCountBits = 20;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
constexpr uint32_t kEpochMask = (1u << 24) - 1;
constexpr int kSpinsBeforeSleep = 4000;  // some tens of microseconds
constexpr int kSpinsBeforeYield = 2000;

uint64_t Pack(uint32_t epoch, uint64_t tasks) {
  return uint64_t{epoch & kEpochMask} << (2 * kCountBits) | tasks << kCountBits;
}
uint32_t EpochOf(uint64_t state) { return static_cast<uint32_t>(state >> (2 * kCountBits)); }

}  // namespace

ThreadPool::ThreadPool(int32_t threads) {
  LK_CHECK(threads >= 1);
  for (int32_t t = 1; t < threads; ++t) workers_.emplace_back([this, t] { WorkerLoop(t); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int32_t tasks, Body body, const void* fn) {
  LK_CHECK(static_cast<uint64_t>(tasks) < kCountMask);
  if (workers_.empty() || tasks <= 1) {
    for (int32_t task = 0; task < tasks; ++task) body(fn, task, 0);
    return;
  }
  body_ = body;
  fn_ = fn;
  done_.store(0, std::memory_order_relaxed);
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  state_.store(Pack(epoch, tasks), std::memory_order_release);
  epoch_.store(epoch);
  if (sleepers_.load() > 0) epoch_.notify_all();
  Drain(epoch, 0);
  for (int spins = 0; done_.load(std::memory_order_acquire) != tasks; ++spins) {
    if (spins < kSpinsBeforeYield) _mm_pause();
    else sched_yield();  // a worker lost its core: give it ours
  }
}

void ThreadPool::Drain(uint32_t epoch, int32_t thread) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (EpochOf(state) == (epoch & kEpochMask)) {
    const uint64_t next = state & kCountMask;
    if (next >= ((state >> kCountBits) & kCountMask)) return;
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    body_(fn_, static_cast<int32_t>(next), thread);
    done_.fetch_add(1, std::memory_order_release);
    state = state_.load(std::memory_order_acquire);
  }
}

void ThreadPool::WorkerLoop(int32_t thread) {
  uint32_t seen = 0;
  while (true) {
    uint32_t epoch = epoch_.load(std::memory_order_acquire);
    for (int spins = 0; epoch == seen && spins < kSpinsBeforeSleep; ++spins) {
      _mm_pause();
      epoch = epoch_.load(std::memory_order_acquire);
    }
    if (epoch == seen) {
      sleepers_.fetch_add(1);
      epoch_.wait(seen);
      sleepers_.fetch_sub(1);
      continue;
    }
    if (stop_.load()) return;
    seen = epoch;
    Drain(epoch, thread);
  }
}

}  // namespace lorikeet
