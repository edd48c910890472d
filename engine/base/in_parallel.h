// Work that a load spreads over a few threads of its own, which end with it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace lorikeet {

// fn(i) for every i in [0, n), begun in ascending order, on as many threads as there are cores, four at
// most, the caller's among them.
inline void InParallel(int64_t n, const std::function<void(int64_t)>& fn) {
  constexpr int64_t kMostThreads = 4;
  const int64_t cores = std::thread::hardware_concurrency();
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < n; i = next++) fn(i);
  };
  std::vector<std::jthread> threads;
  for (int64_t t = 1; t < std::min({kMostThreads, cores, n}); ++t) threads.emplace_back(work);
  work();
}

}  // namespace lorikeet
