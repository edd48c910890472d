#include "tests/e2e/service_fixture.h"

#include <grpcpp/generic/generic_stub.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "absl/strings/str_cat.h"
#include "engine/runner/model_runner.h"
#include "tests/e2e/http_get.h"

namespace lorikeet {

void ServiceTest::SetUp() {
  config_.model = kGoldenModel;
  config_.grpc_port = 0;
  config_.http_port = 0;
  config_.adapter_roots = {kGoldenAdapters};
}

void ServiceTest::TearDown() {
  Release();
  if (service_ != nullptr) service_->Drain(0);
}

ServedModel ServiceTest::MakeModel() {
  ServedModel model;
  auto source = ModelSource::Open(kGoldenModel);
  EXPECT_TRUE(source.ok()) << source.status();
  source_ = *std::move(source);
  base_ = std::make_unique<BaseModelView>(source_);
  const ModelConfig& shape = source_->config();
  model.name = shape.name;
  model.base = base_.get();
  model.kv = KvLayout::Make(shape.layers, shape.kv_heads, shape.head_dim, DType::kF32);
  model.pages = kPages;
  model.vocab_size = shape.vocab;
  model.context_tokens = shape.context;
  model.eos_ids = shape.eos_ids;
  model.tokenizer = *Tokenizer::FromDirectory(kGoldenModel);
  ChatTemplateSource chat = model.tokenizer->chat_template();
  if (!chat_template_.empty()) chat.text = chat_template_;
  model.chat_template = *ChatTemplate::Create(chat, model.tokenizer->named());
  if (real_runner_) {
    RunnerOptions options;
    options.device = "cpu";
    options.kv_bytes = 8 << 20;
    auto runner = *ModelRunner::Create(source_, options);
    model.kv = runner->kv();
    model.pages = runner->pages();
    model.runner = std::move(runner);
    return model;
  }
  if (with_images_) images_ = std::make_unique<FakeImages>(kPages, model.kv.page_bytes());
  auto runner = std::make_unique<FakeRunner>(FakeModel{shape.vocab}, model.kv, model.pages,
                                             images_.get());
  runner->on_run = [this](const Batch& batch, StepResult* result) { return OnRun(batch, result); };
  model.runner = std::move(runner);
  return model;
}

void ServiceTest::Start() {
  auto service = Service::Open(config_);
  ASSERT_TRUE(service.ok()) << service.status();
  service_ = *std::move(service);
  const absl::Status status = service_->Serve(MakeModel());
  ASSERT_TRUE(status.ok()) << status;
  channel_ = grpc::CreateChannel(absl::StrCat("127.0.0.1:", service_->grpc_port()),
                                 grpc::InsecureChannelCredentials());
  generation_ = v1::GenerationService::NewStub(channel_);
  adapters_ = v1::AdapterService::NewStub(channel_);
}

absl::Status ServiceTest::OnRun(const Batch& batch, StepResult* result) {
  std::unique_lock lock(mutex_);
  released_.wait(lock, [this] { return steps_allowed_ > 0; });
  if (steps_allowed_ != kNoBound) --steps_allowed_;
  for (size_t i = 0; i < batch.logit_rows.size() && !script_.empty(); ++i) {
    const LogitRow& row = batch.logit_rows[i];
    if (row.target >= 0) continue;
    const size_t generated = row.history.size() - row.prompt_tokens;
    result->sampled[i].token = script_[std::min(generated, script_.size() - 1)];
  }
  return device_;
}

void ServiceTest::Hold() {
  std::lock_guard lock(mutex_);
  steps_allowed_ = 0;
}

void ServiceTest::Allow(int64_t steps) {
  std::lock_guard lock(mutex_);
  steps_allowed_ = steps;
  released_.notify_all();
}

void ServiceTest::Release() { Allow(kNoBound); }

void ServiceTest::Fail(absl::Status device) {
  std::lock_guard lock(mutex_);
  device_ = std::move(device);
}

void ServiceTest::Script(std::vector<int32_t> tokens) {
  std::lock_guard lock(mutex_);
  script_ = std::move(tokens);
}

std::vector<int32_t> ServiceTest::Encode(const std::string& text) const {
  static const auto* tokenizer = Tokenizer::FromDirectory(kGoldenModel)->release();
  return *tokenizer->Encode(text, /*add_special=*/false);
}

v1::GenerateRequest ServiceTest::TextRequest(const std::string& text, int32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_seed(1);
  request.mutable_stop()->set_max_tokens(max_tokens);
  request.mutable_stop()->set_ignore_eos(true);
  return request;
}

grpc::Status ServiceTest::Unary(const v1::GenerateRequest& request,
                                v1::GenerateResponse* response) {
  grpc::ClientContext context;
  return generation_->GenerateUnary(&context, request, response);
}

grpc::Status ServiceTest::Stream(const v1::GenerateRequest& request,
                                 std::vector<v1::GenerateResponse>* messages) {
  grpc::ClientContext context;
  const auto reader = generation_->Generate(&context, request);
  v1::GenerateResponse message;
  while (reader->Read(&message)) messages->push_back(message);
  return reader->Finish();
}

grpc::Status ServiceTest::Load(const std::string& name, const std::string& path) {
  grpc::ClientContext context;
  v1::LoadAdapterRequest request;
  request.set_name(name);
  request.set_path(path);
  v1::LoadAdapterResponse response;
  return adapters_->LoadAdapter(&context, request, &response);
}

grpc::Status ServiceTest::Raw(const std::string& method, const std::string& request,
                              std::string* response) {
  grpc::GenericStub stub(channel_);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const grpc::Slice slice(request);
  const grpc::ByteBuffer bytes(&slice, 1);
  const auto stream = stub.PrepareCall(&context, method, &queue);
  const auto wait = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  stream->StartCall(nullptr);
  wait();
  stream->WriteLast(bytes, grpc::WriteOptions(), nullptr);
  wait();
  grpc::ByteBuffer reply;
  stream->Read(&reply, nullptr);
  if (wait()) {
    std::vector<grpc::Slice> slices;
    EXPECT_TRUE(reply.Dump(&slices).ok());
    for (const grpc::Slice& part : slices) {
      response->append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  grpc::Status status;
  stream->Finish(&status, nullptr);
  wait();
  return status;
}

std::string ServiceTest::HttpGet(const std::string& path, int status, const std::string& verb) {
  const std::string reply = HttpExchange(service_->http_port(), verb, path);
  EXPECT_EQ(reply.rfind(absl::StrCat("HTTP/1.1 ", status, " "), 0), 0u) << reply;
  const size_t body = reply.find("\r\n\r\n");
  return body == std::string::npos ? std::string() : reply.substr(body + 4);
}

double ServiceTest::Metric(const std::string& series) {
  return MetricValue(HttpGet("/metrics"), series);
}

void ServiceTest::WaitFor(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

v1::GenerateResponse Sum(const std::vector<v1::GenerateResponse>& messages) {
  v1::GenerateResponse sum;
  for (const v1::GenerateResponse& message : messages) {
    const std::string text = sum.text() + message.text();
    sum.MergeFrom(message);
    sum.set_text(text);
  }
  return sum;
}

}  // namespace lorikeet
