// How long the registry takes for what must never wait, with 10,000 adapters registered, while
// requests come and go and adapters are loaded. Prints Markdown rows; no arguments.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "adapters_cache/registry.h"
#include "engine/base/check.h"
#include "tests/unit/adapters_support.h"

namespace lorikeet {
namespace {

using testing::TempDir;
using testing::TestAdapter;
using testing::TestBase;
using std::chrono::steady_clock;

constexpr int kAdapters = 10'000;
constexpr int kCalls = 20'000;

std::string NameOf(int i) { return "tenant/adapter-" + std::to_string(i); }

template <typename Call>
void Row(const char* what, int calls, const Call& call) {
  std::vector<double> micros;
  for (int i = 0; i < calls; ++i) {
    const auto start = steady_clock::now();
    call();
    micros.push_back(std::chrono::duration<double, std::micro>(steady_clock::now() - start).count());
  }
  std::ranges::sort(micros);
  std::printf("| %s | %.1f | %.1f | %.1f |\n", what, micros[calls / 2], micros[calls / 100 * 99],
              micros.back());
}

int Main() {
  const TestBase base = TestBase::Random(2);
  const TempDir dir;
  for (int i = 0; i < kAdapters; ++i) {
    TestAdapter::Lora(base, {"q_proj"}, 4, i).Write(dir.path() / std::to_string(i));
  }
  AdapterRegistry::Options options{.base_name = "base", .allowed_roots = {dir.path()}};
  auto registry = *AdapterRegistry::Create(base, options);
  for (int i = 0; i < kAdapters; ++i) {
    LK_CHECK(registry->Load(NameOf(i), std::to_string(i), AdapterRegistry::Origin::kClient).ok());
  }

  std::atomic<bool> stop = false;
  std::thread requests([&] {
    std::mt19937 random(1);
    std::vector<AdapterLease> held(64);
    for (size_t i = 0; !stop; ++i) {
      held[i % held.size()] = *registry->Acquire(NameOf(random() % (kAdapters / 2)));
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
  });
  std::thread loads([&] {
    for (int i = 0; !stop; ++i) {
      const int which = kAdapters / 2 + i % (kAdapters / 2);
      registry->Unload(NameOf(which), std::chrono::microseconds(0)).IgnoreError();
      LK_CHECK(registry->Load(NameOf(which), std::to_string(which), AdapterRegistry::Origin::kClient).ok());
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  });

  std::printf("| call | median, us | 99 %%, us | longest, us |\n|---|---|---|---|\n");
  std::mt19937 random(2);
  const auto any = [&] { return NameOf(random() % (kAdapters / 2)); };
  Row("admission: a lease of an adapter in host memory", kCalls,
      [&] { LK_CHECK(registry->Acquire(any()).ok()); });
  Row("get", kCalls, [&] { LK_CHECK(registry->Get(any()).ok()); });
  Row("list, a page of 100", kCalls, [&] {
    LK_CHECK(registry->List({.after = any(), .limit = 100}).size() > 0);
  });
  Row("list, all", 200, [&] { LK_CHECK(registry->List({}).size() > 0); });
  stop = true;
  requests.join();
  loads.join();
  return 0;
}

}  // namespace
}  // namespace lorikeet

int main() { return lorikeet::Main(); }
