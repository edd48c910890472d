// AdapterService over gRPC: every call, what it answers and what it refuses.
#include <gmock/gmock.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "adapters_cache/sha256.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;
namespace fs = std::filesystem;
using Stub = v1::AdapterService::StubInterface;

std::string Read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

std::string HashOf(const std::string& bytes) {
  Sha256 hash;
  hash.Add(bytes);
  return hash.Hex();
}

class AdaptersTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServiceTest::SetUp();
    std::string pattern = (fs::temp_directory_path() / "lorikeet-e2e-XXXXXX").string();
    directory_ = mkdtemp(pattern.data());
    config_.adapter_dir = directory_ / "kept";
  }
  void TearDown() override {
    ServiceTest::TearDown();
    service_.reset();
    fs::remove_all(directory_);
  }

  template <typename Request, typename Reply>
  grpc::Status Call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Reply*),
                    const Request& request, Reply* reply) {
    grpc::ClientContext context;
    return (adapters().*method)(&context, request, reply);
  }
  v1::Adapter Get(const std::string& name) {
    v1::GetAdapterRequest request;
    request.set_name(name);
    v1::GetAdapterResponse reply;
    const grpc::Status status = Call(&Stub::GetAdapter, request, &reply);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return reply.adapter();
  }

  struct Upload {
    std::string config = Read(fs::path(kGoldenAdapters) / "lora/adapter_config.json");
    std::string weights = Read(fs::path(kGoldenAdapters) / "lora/adapter_model.safetensors");
    v1::UploadHeader header;
    bool send_header = true;
    std::string text;  // empty: none is sent
    Upload() {
      header.set_name("sent");
      header.set_weights_bytes(static_cast<int64_t>(weights.size()));
      header.set_weights_sha256(HashOf(weights));
      header.set_config_sha256(HashOf(config));
    }
  };
  grpc::Status Send(const Upload& upload, v1::LoadAdapterResponse* reply) {
    grpc::ClientContext context;
    const auto writer = adapters().UploadAdapter(&context, reply);
    v1::UploadAdapterRequest part;
    *part.mutable_header() = upload.header;
    if (upload.send_header) writer->Write(part);
    part.set_config(upload.config);
    writer->Write(part);
    if (!upload.text.empty()) {
      part.mutable_text()->set_name(upload.text);
      writer->Write(part);
    }
    for (size_t at = 0; at < upload.weights.size(); at += 1000) {
      part.set_weights(upload.weights.substr(at, 1000));
      if (!writer->Write(part)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }
  grpc::Status Send(const Upload& upload) {
    v1::LoadAdapterResponse reply;
    return Send(upload, &reply);
  }

  fs::path directory_;
};

TEST_F(AdaptersTest, AnUploadServesLikeItsDirectoryAndOutlivesTheServer) {
  Start();
  v1::LoadAdapterResponse reply;
  const grpc::Status status = Send(Upload(), &reply);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_TRUE(Load("loaded", "lora").ok());
  EXPECT_EQ(reply.adapter().version(), Get("loaded").version());
  EXPECT_TRUE(Send(Upload()).ok()) << "once more";

  service_.reset();
  Start();
  EXPECT_EQ(Get("sent").version(), reply.adapter().version());
  EXPECT_FALSE(Get("sent").in_host());
  v1::GenerateRequest request = TextRequest("hello", 2);
  request.set_adapter("sent");
  v1::GenerateResponse answer;
  ASSERT_TRUE(Unary(request, &answer).ok());
  EXPECT_EQ(answer.finish().adapter_version(), reply.adapter().version());
  EXPECT_GT(answer.finish().usage().adapter_read_us(), 0) << "it was read for this request";
  ASSERT_TRUE(Unary(request, &answer).ok());
  EXPECT_EQ(answer.finish().usage().adapter_read_us(), 0);
  EXPECT_EQ(Metric("lorikeet_adapter_misses_total{tier=\"host\"}"), 1);
}

TEST_F(AdaptersTest, ABadUploadLeavesNothing) {
  Start();
  const auto code = [&](const Upload& upload) { return Send(upload).error_code(); };
  Upload upload;
  upload.weights[500] ^= 1;
  EXPECT_EQ(code(upload), grpc::StatusCode::DATA_LOSS);
  upload = Upload();
  upload.config += " ";
  EXPECT_EQ(code(upload), grpc::StatusCode::DATA_LOSS);
  upload = Upload();
  upload.weights.pop_back();
  EXPECT_EQ(code(upload), grpc::StatusCode::DATA_LOSS);
  upload = Upload();
  upload.weights += "more";
  EXPECT_EQ(code(upload), grpc::StatusCode::DATA_LOSS);
  upload = Upload();
  upload.header.set_weights_bytes(0);
  EXPECT_EQ(code(upload), grpc::StatusCode::INVALID_ARGUMENT);
  upload = Upload();
  upload.header.set_weights_sha256("../../../etc");
  EXPECT_EQ(code(upload), grpc::StatusCode::INVALID_ARGUMENT);
  upload = Upload();
  (*upload.header.mutable_text_sha256())["../adapter_config.json"] = HashOf("");
  EXPECT_EQ(code(upload), grpc::StatusCode::INVALID_ARGUMENT);
  upload = Upload();
  (*upload.header.mutable_text_sha256())["tokenizer.json"] = HashOf("what never comes");
  EXPECT_EQ(code(upload), grpc::StatusCode::DATA_LOSS);
  upload = Upload();
  upload.text = "chat_template.jinja";
  EXPECT_EQ(code(upload), grpc::StatusCode::INVALID_ARGUMENT);
  upload = Upload();
  upload.send_header = false;
  EXPECT_EQ(code(upload), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(service_->adapters(), 0);
  for (const auto& left : fs::directory_iterator(directory_ / "kept" / "uploads")) {
    ADD_FAILURE() << left.path();
  }
}

// A pipe that nobody writes to stands for a disk that stalls: to sync it waits for it to open.
TEST_F(AdaptersTest, ADiskThatStallsHoldsUpNoOtherCall) {
  constexpr int kUploads = 64;  // far more than there are threads
  Start();
  struct Sent {
    grpc::ClientContext context;
    v1::LoadAdapterResponse reply;
    std::unique_ptr<grpc::ClientWriterInterface<v1::UploadAdapterRequest>> writer;
  };
  std::vector<Sent> sent(kUploads);
  const Upload upload;
  for (Sent& one : sent) {
    one.writer = adapters().UploadAdapter(&one.context, &one.reply);
    v1::UploadAdapterRequest header;
    *header.mutable_header() = upload.header;
    ASSERT_TRUE(one.writer->Write(header));
  }
  const fs::path folder = directory_ / "kept/uploads";
  std::vector<fs::path> begun;
  while (begun.size() < kUploads) {
    begun.clear();
    std::error_code none_yet;
    for (const auto& entry : fs::directory_iterator(folder, none_yet)) begun.push_back(entry.path());
  }
  for (const fs::path& scratch : begun) ASSERT_EQ(mkfifo((scratch / "stalled").c_str(), 0600), 0);
  for (Sent& one : sent) {
    v1::UploadAdapterRequest part;
    part.set_config(upload.config);
    ASSERT_TRUE(one.writer->Write(part));
    part.set_weights(upload.weights);
    ASSERT_TRUE(one.writer->Write(part) && one.writer->WritesDone());
  }
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(Load(absl::StrCat("loaded", i), "lora").ok());
    EXPECT_EQ(Get(absl::StrCat("loaded", i)).name(), absl::StrCat("loaded", i));
  }
  std::vector<std::fstream> opened;  // for reading and writing: waits for nobody
  for (const fs::path& scratch : begun) opened.emplace_back(scratch / "stalled");
  for (Sent& one : sent) {
    EXPECT_EQ(one.writer->Finish().error_code(), grpc::StatusCode::UNAVAILABLE) << "a pipe has no sync";
  }
}

TEST_F(AdaptersTest, AnUploadsFilesGoWithTheLastNameThatUsesThem) {
  const fs::path uploads = directory_ / "kept/uploads";
  const auto folders = [&] {
    return std::distance(fs::directory_iterator(uploads), fs::directory_iterator());
  };
  const auto become = [&](int64_t count) {  // they go after the answer
    for (int i = 0; i < 1000 && folders() != count; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return folders() == count;
  };
  const auto unload = [&](const std::string& name) {
    v1::UnloadAdapterRequest request;
    request.set_name(name);
    v1::UnloadAdapterResponse reply;
    return Call(&Stub::UnloadAdapter, request, &reply).ok();
  };
  fs::create_directories(uploads / "partial-by-a-crash");
  Start();
  EXPECT_EQ(folders(), 0);
  Upload upload;
  ASSERT_TRUE(Send(upload).ok());
  upload.header.set_name("twin");
  ASSERT_TRUE(Send(upload).ok());
  EXPECT_EQ(folders(), 1) << "the same files";
  v1::SetAliasRequest alias;
  alias.set_alias("prod");
  v1::AdapterTarget* target = alias.add_targets();
  target->set_target("twin");
  target->set_weight(1);
  v1::SetAliasResponse answer;
  ASSERT_TRUE(Call(&Stub::SetAlias, alias, &answer).ok());
  EXPECT_TRUE(unload("sent") && unload("twin"));
  EXPECT_EQ(folders(), 1) << "the alias is there";
  EXPECT_TRUE(unload("prod"));
  EXPECT_TRUE(become(0));

  ASSERT_TRUE(Send(upload).ok());
  upload.config = Read(fs::path(kGoldenAdapters) / "rslora/adapter_config.json");
  upload.weights = Read(fs::path(kGoldenAdapters) / "rslora/adapter_model.safetensors");
  upload.header.set_weights_bytes(static_cast<int64_t>(upload.weights.size()));
  upload.header.set_weights_sha256(HashOf(upload.weights));
  upload.header.set_config_sha256(HashOf(upload.config));
  EXPECT_EQ(Send(upload).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_TRUE(become(1)) << "what was refused is not kept";
  upload.header.set_replace(true);
  ASSERT_TRUE(Send(upload).ok());
  EXPECT_TRUE(become(1)) << "what it replaced went";
  service_.reset();
  Start();
  v1::GenerateRequest request = TextRequest("hello", 2);
  request.set_adapter("twin");
  v1::GenerateResponse generated;
  EXPECT_TRUE(Unary(request, &generated).ok());
}

TEST_F(AdaptersTest, WithoutADirectoryUploadsAreRefused) {
  config_.adapter_dir.clear();
  Start();
  const grpc::Status status = Send(Upload());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("--adapter-dir"));
}

TEST_F(AdaptersTest, ListsAPageAtATime) {
  Start();
  for (const char* name : {"a1", "a2", "a3", "b1"}) ASSERT_TRUE(Load(name, "lora").ok());
  v1::ListAdaptersRequest request;
  request.set_name_prefix("a");
  request.set_page_size(2);
  v1::ListAdaptersResponse page;
  ASSERT_TRUE(Call(&Stub::ListAdapters, request, &page).ok());
  ASSERT_THAT(page.adapters(), SizeIs(2));
  request.set_page_token(page.next_page_token());
  ASSERT_TRUE(Call(&Stub::ListAdapters, request, &page).ok());
  ASSERT_THAT(page.adapters(), SizeIs(1));
  EXPECT_EQ(page.adapters(0).name(), "a3");
  EXPECT_EQ(page.next_page_token(), "");
  request.set_page_size(1001);
  const grpc::Status status = Call(&Stub::ListAdapters, request, &page);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("page_size: 1001"));
}

TEST_F(AdaptersTest, AReloadIsANewVersionAndRunningRequestsFinishOnTheOldOne) {
  const fs::path root = directory_ / "root";
  fs::create_directories(root);
  fs::copy(fs::path(kGoldenAdapters) / "lora", root / "style");
  config_.adapter_roots = {root};
  Start();
  ASSERT_TRUE(Load("style", "style").ok());
  const std::string old_version = Get("style").version();
  v1::GenerateRequest request = TextRequest("hello", 20);
  request.set_adapter("style");
  v1::GenerateResponse alone, running, after;
  ASSERT_TRUE(Unary(request, &alone).ok());
  Hold();
  auto generating = std::async(std::launch::async, [&] { return Unary(request, &running); });
  WaitFor([&] { return Metric("lorikeet_running_requests") == 1; });

  fs::remove_all(root / "style");
  fs::copy(fs::path(kGoldenAdapters) / "rslora", root / "style");
  v1::ReloadAdapterRequest reload;
  reload.set_name("style");
  v1::LoadAdapterResponse reloaded;
  ASSERT_TRUE(Call(&Stub::ReloadAdapter, reload, &reloaded).ok());
  EXPECT_NE(reloaded.adapter().version(), old_version);
  Release();
  ASSERT_TRUE(generating.get().ok());
  EXPECT_EQ(running.finish().adapter_version(), old_version);
  EXPECT_THAT(running.token_ids(), ::testing::ElementsAreArray(alone.token_ids()));
  ASSERT_TRUE(Unary(request, &after).ok());
  EXPECT_EQ(after.finish().adapter_version(), reloaded.adapter().version());
}

TEST_F(AdaptersTest, AliasPinAndPrefetchAnswerWithTheAdapter) {
  Start();
  ASSERT_TRUE(Load("a", "lora").ok() && Load("b", "rslora").ok());
  v1::SetAliasRequest alias;
  alias.set_alias("prod");
  for (const char* name : {"a", "b"}) {
    v1::AdapterTarget* target = alias.add_targets();
    target->set_target(name);
    target->set_weight(1);
  }
  v1::SetAliasResponse aliased;
  ASSERT_TRUE(Call(&Stub::SetAlias, alias, &aliased).ok());
  ASSERT_THAT(aliased.adapter().targets(), SizeIs(2));
  EXPECT_EQ(aliased.adapter().targets(1).target(), Get("b").version());

  v1::PinAdapterRequest pin;
  pin.set_name("a");
  pin.set_pinned(true);
  v1::PinAdapterResponse pinned;
  ASSERT_TRUE(Call(&Stub::PinAdapter, pin, &pinned).ok());
  EXPECT_TRUE(pinned.adapter().pinned());
  v1::PrefetchAdapterRequest prefetch;
  prefetch.set_name("b");
  v1::PrefetchAdapterResponse fetched;
  ASSERT_TRUE(Call(&Stub::PrefetchAdapter, prefetch, &fetched).ok());
  EXPECT_TRUE(fetched.adapter().in_host());
  prefetch.set_name("nobody");
  EXPECT_EQ(Call(&Stub::PrefetchAdapter, prefetch, &fetched).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(AdaptersTest, WatchTellsWhatHappens) {
  Start();
  grpc::ClientContext context;
  const auto reader = adapters().WatchAdapters(&context, {});
  reader->WaitForInitialMetadata();
  ASSERT_TRUE(Load("a", "lora").ok());
  v1::AdapterEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.kind(), v1::AdapterEvent::KIND_IN_HOST);
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.kind(), v1::AdapterEvent::KIND_REGISTERED);
  EXPECT_EQ(event.name(), "a");
  EXPECT_EQ(event.version(), Get("a").version());
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(AdaptersTest, AnUnloadMayNotWaitAtAll) {
  Start();
  ASSERT_TRUE(Load("a", "lora").ok());
  v1::UnloadAdapterRequest unload;
  unload.set_name("a");
  unload.set_drain_ms(0);
  v1::UnloadAdapterResponse unloaded;
  ASSERT_TRUE(Call(&Stub::UnloadAdapter, unload, &unloaded).ok());
  EXPECT_GT(unloaded.host_bytes_freed(), 0);
  EXPECT_EQ(Call(&Stub::UnloadAdapter, unload, &unloaded).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(AdaptersTest, ADeviceIsATierOfItsOwn) {
  with_images_ = true;
  Start();
  ASSERT_TRUE(Load("a", "lora").ok());
  ASSERT_TRUE(Load("b", "lora_qv").ok());
  EXPECT_EQ(Get("a").device_bytes(), 0);
  v1::GenerateRequest request = TextRequest("hello", 2);
  request.set_adapter("a");
  v1::GenerateResponse answer;
  ASSERT_TRUE(Unary(request, &answer).ok());
  EXPECT_GT(answer.finish().usage().adapter_copy_us(), 0);
  EXPECT_EQ(answer.finish().usage().adapter_read_us(), 0);
  ASSERT_TRUE(Unary(request, &answer).ok());
  EXPECT_EQ(answer.finish().usage().adapter_copy_us(), 0) << "it stayed there";
  const int64_t bytes = Get("a").device_bytes();
  EXPECT_GE(bytes, Get("a").bytes());
  EXPECT_EQ(Metric("lorikeet_adapter_device_bytes"), bytes);
  EXPECT_EQ(Metric("lorikeet_adapters_resident{tier=\"device\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_adapter_misses_total{tier=\"device\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_adapter_hits_total{tier=\"device\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_adapter_loads_total{tier=\"device\"}"), 1);
  EXPECT_GT(Metric("lorikeet_adapter_load_seconds_total{tier=\"device\"}"), 0);
  EXPECT_EQ(Metric("lorikeet_adapter_wait_seconds_count{tier=\"device\"}"), 1);
  EXPECT_EQ(Metric("lorikeet_decode_waits_for_adapters_total"), 0);
  v1::ListAdaptersRequest list;
  list.set_on_device_only(true);
  v1::ListAdaptersResponse listed;
  ASSERT_TRUE(Call(&Stub::ListAdapters, list, &listed).ok());
  ASSERT_THAT(listed.adapters(), SizeIs(1));
  EXPECT_EQ(listed.adapters(0).name(), "a");

  v1::UnloadAdapterRequest unload;
  unload.set_name("a");
  unload.set_drain_ms(0);
  v1::UnloadAdapterResponse unloaded;
  const int64_t host_bytes = Get("a").bytes();
  ASSERT_TRUE(Call(&Stub::UnloadAdapter, unload, &unloaded).ok()) << "nobody uses it";
  EXPECT_EQ(unloaded.host_bytes_freed(), host_bytes);
  EXPECT_EQ(unloaded.device_bytes_freed(), bytes);
  EXPECT_EQ(Metric("lorikeet_adapter_device_bytes"), 0);
  unload.set_name("b");
  ASSERT_TRUE(Call(&Stub::UnloadAdapter, unload, &unloaded).ok());
  EXPECT_EQ(unloaded.device_bytes_freed(), 0);
}

TEST_F(AdaptersTest, PlanCapacityWeighsAdaptersAgainstTokensWhereTheyShareAPool) {
  with_images_ = true;
  Start();
  v1::PlanCapacityRequest request;
  request.set_rank(64);
  v1::PlanCapacityResponse empty, beside;
  ASSERT_TRUE(Call(&Stub::PlanCapacity, request, &empty).ok());
  EXPECT_GE(empty.image_bytes(), empty.adapter_bytes());
  EXPECT_EQ(empty.kv_tokens(), int64_t{kPages} * 16);
  EXPECT_GT(empty.device_adapters(), 1);
  request.set_adapters(empty.device_adapters());
  request.set_kv_tokens(empty.kv_tokens() / 2);
  ASSERT_TRUE(Call(&Stub::PlanCapacity, request, &beside).ok());
  EXPECT_EQ(beside.device_adapters(), empty.device_adapters() / 2);
  EXPECT_LT(beside.kv_tokens(), empty.kv_tokens() / 50) << "no room for another adapter";
  request.set_kv_tokens(empty.kv_tokens() * 2);
  request.set_adapters(empty.device_adapters() + 1);
  ASSERT_TRUE(Call(&Stub::PlanCapacity, request, &beside).ok());
  EXPECT_EQ(beside.device_adapters(), 0);
  EXPECT_EQ(beside.kv_tokens(), 0);
  request.set_adapters(-1);
  EXPECT_EQ(Call(&Stub::PlanCapacity, request, &beside).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(AdaptersTest, PlanCapacityCountsBytesAndTokens) {
  config_.adapter_host_mib = 1;
  Start();
  v1::PlanCapacityRequest request;
  request.set_rank(4);
  request.set_bytes_per_value(4);
  request.add_linears("q_proj");
  v1::PlanCapacityResponse plan;
  ASSERT_TRUE(Call(&Stub::PlanCapacity, request, &plan).ok());
  ASSERT_TRUE(Load("qv", "lora_qv").ok());
  // q_proj is hidden x hidden in this model: as wide as the model's other square linears.
  EXPECT_GT(plan.adapter_bytes(), 0);
  EXPECT_EQ(plan.host_adapters(), (1 << 20) / plan.adapter_bytes());
  EXPECT_EQ(plan.device_adapters(), -1);
  EXPECT_EQ(plan.kv_tokens(), int64_t{kPages} * 16);
  request.set_rank(8);
  v1::PlanCapacityResponse twice;
  ASSERT_TRUE(Call(&Stub::PlanCapacity, request, &twice).ok());
  EXPECT_EQ(twice.adapter_bytes(), 2 * plan.adapter_bytes());
  request.add_linears("w_proj");
  const grpc::Status status = Call(&Stub::PlanCapacity, request, &twice);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("w_proj"));
}

TEST_F(AdaptersTest, AThousandLoadsAtTheSameTimeEndAsTheyShould) {
  Start();
  std::vector<std::thread> threads;
  std::atomic<int> ok = 0, full = 0;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 125; ++i) {
        const grpc::Status status = Load(absl::StrCat("n", t, "-", i), i % 2 ? "lora" : "rslora");
        ok += status.ok();
        full += status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ok + full, 1000);
  EXPECT_EQ(service_->adapters(), ok);
  EXPECT_EQ(Metric("lorikeet_adapter_versions"), 2);
}

}  // namespace
}  // namespace lorikeet
