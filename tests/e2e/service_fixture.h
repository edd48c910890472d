// The real service on free ports, with the tokenizer, the shapes and the adapters of a small golden
// model, over a runner whose answers a test can script, delay or fail.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/base_model_view.h"
#include "gtest/gtest.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "lorikeet/v1/generation.grpc.pb.h"
#include "server/service.h"
#include "tests/sim/fake_runner.h"

namespace lorikeet {

inline constexpr char kGoldenModel[] = "tests/golden/models/llama";
inline constexpr char kGoldenAdapters[] = "tests/golden/adapters/llama";

class ServiceTest : public ::testing::Test {
 protected:
  static constexpr int32_t kPages = 4096;
  static constexpr int64_t kNoBound = std::numeric_limits<int64_t>::max();

  void SetUp() override;
  void TearDown() override;

  // Starts the service; config_ may be changed before.
  void Start();

  // The engine stops before the end of its next step. Allow lets so many steps end, Release all.
  void Hold();
  void Allow(int64_t steps);
  void Release();
  // The engine's steps return this from now on.
  void Fail(absl::Status device);

  // Every request's answer from now on: its n-th token is tokens[n], the last one for ever after.
  void Script(std::vector<int32_t> tokens);
  std::vector<int32_t> Encode(const std::string& text) const;

  v1::GenerationService::StubInterface& generation() { return *generation_; }
  v1::AdapterService::StubInterface& adapters() { return *adapters_; }

  static v1::GenerateRequest TextRequest(const std::string& text, int32_t max_tokens);
  grpc::Status Unary(const v1::GenerateRequest& request, v1::GenerateResponse* response);
  // All messages of a stream, in order.
  grpc::Status Stream(const v1::GenerateRequest& request,
                      std::vector<v1::GenerateResponse>* messages);
  grpc::Status Load(const std::string& name, const std::string& path);
  // A call of any method with bytes as they are.
  grpc::Status Raw(const std::string& method, const std::string& request, std::string* response);

  // The body, or an empty string if the status is not `status`.
  std::string HttpGet(const std::string& path, int status = 200, const std::string& verb = "GET");
  // A metric's value; -1: it is not there. `series` with its labels, as it is printed.
  double Metric(const std::string& series);
  // Waits until the condition holds; a test that hangs here is ended by its time limit.
  static void WaitFor(const std::function<bool()>& condition);

  ServerConfig config_;
  std::string chat_template_;  // instead of the model's; empty: its own
  bool real_runner_ = false;  // the golden model itself answers; nothing can be scripted or held
  bool with_images_ = false;  // adapters take pages, as on a GPU
  std::unique_ptr<Service> service_;
  std::shared_ptr<grpc::Channel> channel_;

 private:
  ServedModel MakeModel();
  absl::Status OnRun(const Batch& batch, StepResult* result);

  std::shared_ptr<const ModelSource> source_;
  std::unique_ptr<BaseModelView> base_;
  std::unique_ptr<FakeImages> images_;
  std::unique_ptr<Tokenizer> tokenizer_;  // the test's own
  std::unique_ptr<v1::GenerationService::Stub> generation_;
  std::unique_ptr<v1::AdapterService::Stub> adapters_;

  std::mutex mutex_;
  std::condition_variable released_;
  int64_t steps_allowed_ = kNoBound;
  absl::Status device_;
  std::vector<int32_t> script_;
};

// What the messages of a stream add up to.
v1::GenerateResponse Sum(const std::vector<v1::GenerateResponse>& messages);

}  // namespace lorikeet
