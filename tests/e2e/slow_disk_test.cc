// A disk that stands still holds up who changes adapters, and nobody else.
#include <gmock/gmock.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using ::testing::Contains;

// While it stands still nobody's fsync returns.
class Disk {
 public:
  void StandStill() {
    std::lock_guard lock(mutex_);
    still_ = true;
  }
  void GoOn() {
    std::lock_guard lock(mutex_);
    still_ = false;
    goes_on_.notify_all();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    goes_on_.wait(lock, [this] { return !still_; });
    --waiting_;
  }
  int waiting() {
    std::lock_guard lock(mutex_);
    return waiting_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable goes_on_;
  bool still_ = false;
  int waiting_ = 0;
};

Disk& TheDisk() {
  static Disk disk;
  return disk;
}

}  // namespace
}  // namespace lorikeet

// In place of the C library's.
extern "C" int fsync(int file) {
  lorikeet::TheDisk().Wait();
  return static_cast<int>(syscall(SYS_fsync, file));
}

namespace lorikeet {
namespace {

class SlowDiskTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServiceTest::SetUp();
    config_.adapter_dir = state_.path().string();
    Start();
    for (const char* name : {"a", "b", "c"}) ASSERT_TRUE(Load(name, "lora").ok());
  }
  void TearDown() override {
    TheDisk().GoOn();
    ServiceTest::TearDown();
  }

  std::unique_ptr<HttpClient> Send(const std::string& verb, const std::string& path,
                                   const std::string& body) {
    auto client = std::make_unique<HttpClient>(service_->http_port());
    client->Send(absl::StrCat(verb, " ", path, " HTTP/1.1\r\nHost: test\r\nContent-Length: ",
                              body.size(), "\r\n\r\n", body));
    return client;
  }

  const testing::TempDir state_;
};

// There are fewer threads for HTTP than changes here.
TEST_F(SlowDiskTest, ChatsGoOnWhileChangesWaitForIt) {
  TheDisk().StandStill();
  const std::string alias = R"({"targets": [{"target": "a", "weight": 1}]})";
  std::vector<std::unique_ptr<HttpClient>> changes;
  changes.push_back(Send("POST", "/v1/adapters/a/pin", R"({"pinned": true})"));
  changes.push_back(Send("POST", "/v1/adapters/other/alias", alias));
  changes.push_back(Send("DELETE", "/v1/adapters/b", ""));
  changes.push_back(Send("POST", "/v1/unload_lora_adapter", R"({"lora_name": "c"})"));
  changes.push_back(Send("POST", "/v1/adapters", R"({"name": "d", "path": "dora"})"));
  WaitFor([] { return TheDisk().waiting() > 0; });

  const std::string chat = R"({"model": "a", "stream": true, "max_tokens": 8,
                               "messages": [{"role": "user", "content": "hello"}]})";
  for (int i = 0; i < 4; ++i) {
    HttpClient client(service_->http_port());
    const HttpResult stream = client.Post("/v1/chat/completions", chat);
    EXPECT_THAT(stream.events(), Contains("[DONE]")) << stream.body;
  }
  EXPECT_EQ(HttpGet("/health"), "ok\n");
  EXPECT_GT(TheDisk().waiting(), 0);

  TheDisk().GoOn();
  for (const auto& client : changes) {
    const HttpResult answer = client->Receive();
    EXPECT_EQ(answer.status, 200) << answer.body;
  }
  HttpGet("/v1/adapters/b", 404);
}

}  // namespace
}  // namespace lorikeet
