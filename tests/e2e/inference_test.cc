// The Open Inference Protocol over real gRPC: the same answers as GenerationService's.
#include <gmock/gmock.h>

#include <cstring>
#include <map>

#include "absl/strings/str_cat.h"
#include "inference/inference.grpc.pb.h"
#include "tests/e2e/service_fixture.h"

namespace lorikeet {
namespace {

using inference::GRPCInferenceService;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class InferenceTest : public ServiceTest {
 protected:
  void Serve() {
    Start();
    ASSERT_TRUE(Load("style", "dora").ok());
    stub_ = GRPCInferenceService::NewStub(channel_);
  }
  static std::string Raw(const std::string& text) {
    const auto bytes = static_cast<uint32_t>(text.size());
    return std::string(reinterpret_cast<const char*>(&bytes), sizeof bytes) + text;
  }
  static inference::ModelInferRequest Request(const std::string& model, const std::string& text) {
    inference::ModelInferRequest request;
    request.set_model_name(model);
    request.set_id("7");
    auto* input = request.add_inputs();
    input->set_name("text_input");
    input->set_datatype("BYTES");
    input->add_shape(1);
    request.add_raw_input_contents(Raw(text));
    auto& parameters = *request.mutable_parameters();
    parameters["max_tokens"].set_int64_param(6);
    parameters["temperature"].set_double_param(0);
    parameters["ignore_eos"].set_bool_param(true);
    parameters["seed"].set_int64_param(1);
    return request;
  }
  static std::vector<std::string> Texts(const inference::ModelInferResponse& response) {
    std::vector<std::string> texts;
    const std::string& raw = response.raw_output_contents(0);
    for (size_t at = 0; at < raw.size(); at += texts.back().size() + 4) {
      uint32_t bytes = 0;
      std::memcpy(&bytes, &raw[at], sizeof bytes);
      texts.push_back(raw.substr(at + 4, bytes));
    }
    return texts;
  }
  grpc::Status Infer(const inference::ModelInferRequest& request,
                     inference::ModelInferResponse* response) {
    grpc::ClientContext context;
    return stub_->ModelInfer(&context, request, response);
  }
  std::string Refused(const inference::ModelInferRequest& request) {
    inference::ModelInferResponse response;
    const grpc::Status status = Infer(request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    return status.error_message();
  }

  std::unique_ptr<GRPCInferenceService::Stub> stub_;
};

TEST_F(InferenceTest, AModelAnswersAsOverTheOwnApi) {
  Serve();
  for (const std::string model : {"llama", "style"}) {
    v1::GenerateRequest own = TextRequest("hello", 6);
    own.set_adapter(model);
    own.mutable_sampling()->set_temperature(0);
    v1::GenerateResponse wanted;
    ASSERT_TRUE(Unary(own, &wanted).ok());
    inference::ModelInferResponse response;
    const grpc::Status status = Infer(Request(model, "hello"), &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_THAT(Texts(response), ElementsAre(wanted.text()));
    EXPECT_EQ(response.model_name(), model);
    EXPECT_EQ(response.id(), "7");
    EXPECT_EQ(response.model_version(), wanted.finish().adapter_version());
    EXPECT_EQ(response.outputs(0).name(), "text_output");
    EXPECT_THAT(response.outputs(0).shape(), ElementsAre(1));
    EXPECT_EQ(response.parameters().at("finish_reason").string_param(), "length");
    EXPECT_EQ(response.parameters().at("completion_tokens").int64_param(), 6);
  }
}

TEST_F(InferenceTest, SamplingParametersMayBeATensor) {
  Serve();
  inference::ModelInferRequest request = Request("llama", "hello");
  request.clear_parameters();
  auto* input = request.add_inputs();
  input->set_name("sampling_parameters");
  input->set_datatype("BYTES");
  input->add_shape(1);
  request.add_raw_input_contents(
      Raw(R"({"max_tokens": 3, "n": 2, "seed": 1, "ignore_eos": true})"));
  inference::ModelInferResponse response;
  ASSERT_TRUE(Infer(request, &response).ok());
  EXPECT_EQ(Texts(response).size(), 2u);
  EXPECT_EQ(response.parameters().at("completion_tokens").int64_param(), 3);
}

TEST_F(InferenceTest, AStreamAnswersItsRequestsSideBySide) {
  Serve();
  grpc::ClientContext context;
  const auto stream = stub_->ModelStreamInfer(&context);
  std::map<std::string, std::string> wanted, found;
  int open = 0;
  for (const std::string model : {"llama", "style"}) {
    for (const std::string text : {"hello", "one two"}) {
      inference::ModelInferRequest request = Request(model, text);
      inference::ModelInferResponse whole;
      ASSERT_TRUE(Infer(request, &whole).ok());
      request.set_id(model + text);
      wanted[request.id()] = Texts(whole)[0];
      ASSERT_TRUE(stream->Write(request));
      ++open;
    }
  }
  ASSERT_TRUE(stream->Write(Request("nobody", "hello")));
  ++open;
  std::string error;
  inference::ModelStreamInferResponse message;
  while (open > 0 && stream->Read(&message)) {
    const inference::ModelInferResponse& response = message.infer_response();
    if (message.error_message().empty()) {
      found[response.id()] += Texts(response)[0];
    } else {
      error = message.error_message();
    }
    open -= response.parameters().at("triton_final_response").bool_param();
  }
  EXPECT_EQ(found, wanted);
  EXPECT_THAT(error, HasSubstr("'nobody' is not loaded"));
  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&message));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(InferenceTest, LeavingAStreamStopsItsWork) {
  Serve();
  Hold();
  {
    grpc::ClientContext context;
    const auto stream = stub_->ModelStreamInfer(&context);
    inference::ModelInferRequest request = Request("llama", "hello");
    (*request.mutable_parameters())["max_tokens"].set_int64_param(300);
    ASSERT_TRUE(stream->Write(request));
    WaitFor([&] { return Metric("vllm:num_requests_running") == 1; });
    context.TryCancel();
  }
  // Steps go on until the cancel comes, long before the request would end by itself.
  WaitFor([&] {
    Allow(1);
    return Metric("vllm:num_requests_running") == 0;
  });
  EXPECT_EQ(Metric("lorikeet_canceled_requests_total{reason=\"client\"}"), 1);
}

TEST_F(InferenceTest, AdaptersAreModelsOfTheRepository) {
  Serve();
  const auto ready = [&](const std::string& name, const std::string& version = "") {
    grpc::ClientContext context;
    inference::ModelReadyRequest request;
    request.set_name(name);
    request.set_version(version);
    inference::ModelReadyResponse response;
    EXPECT_TRUE(stub_->ModelReady(&context, request, &response).ok());
    return response.ready();
  };
  EXPECT_TRUE(ready("llama"));
  EXPECT_FALSE(ready("rslora"));
  inference::RepositoryModelLoadRequest load;
  load.set_model_name("rslora");  // a directory below the adapter root
  inference::RepositoryModelLoadResponse loaded;
  grpc::ClientContext loading;
  ASSERT_TRUE(stub_->RepositoryModelLoad(&loading, load, &loaded).ok());
  EXPECT_TRUE(ready("rslora"));
  load.set_model_name("other");
  (*load.mutable_parameters())["config"].set_string_param(R"({"path": "lora"})");
  grpc::ClientContext loading_other;
  ASSERT_TRUE(stub_->RepositoryModelLoad(&loading_other, load, &loaded).ok());
  grpc::ClientContext indexing;
  inference::RepositoryIndexResponse index;
  ASSERT_TRUE(stub_->RepositoryIndex(&indexing, {}, &index).ok());
  std::vector<std::string> names;
  for (const auto& model : index.models()) names.push_back(model.name());
  EXPECT_THAT(names, ElementsAre("llama", "other", "rslora", "style"));
  EXPECT_TRUE(ready("other", index.models(1).version().substr(0, 8)));
  EXPECT_FALSE(ready("other", "00000000"));
  grpc::ClientContext describing;
  inference::ModelMetadataRequest describe;
  describe.set_name("other");
  inference::ModelMetadataResponse metadata;
  ASSERT_TRUE(stub_->ModelMetadata(&describing, describe, &metadata).ok());
  EXPECT_THAT(metadata.versions(), ElementsAre(index.models(1).version()));
  EXPECT_EQ(metadata.inputs(0).name(), "text_input");
  inference::RepositoryModelUnloadRequest unload;
  unload.set_model_name("other");
  inference::RepositoryModelUnloadResponse unloaded;
  grpc::ClientContext unloading;
  ASSERT_TRUE(stub_->RepositoryModelUnload(&unloading, unload, &unloaded).ok());
  EXPECT_FALSE(ready("other"));
}

TEST_F(InferenceTest, WhatIsWrongIsNamed) {
  Serve();
  inference::ModelInferRequest request = Request("llama", "hello");
  (*request.mutable_parameters())["top_p"].set_double_param(7);
  EXPECT_THAT(Refused(request), HasSubstr("top_p"));
  request = Request("llama", "hello");
  (*request.mutable_parameters())["priority"].set_int64_param(7);
  EXPECT_THAT(Refused(request), HasSubstr("priority"));
  request = Request("llama", "hello");
  request.set_raw_input_contents(0, "ab");
  EXPECT_THAT(Refused(request), HasSubstr("text_input: its raw contents"));
  request.set_raw_input_contents(0, Raw("a") + Raw("b"));
  EXPECT_THAT(Refused(request), HasSubstr("text_input: 2 texts"));
  request = Request("llama", "hello");
  request.mutable_inputs(0)->set_name("prompt");
  EXPECT_THAT(Refused(request), HasSubstr("'prompt' is none of text_input"));
  request = Request("llama", "hello");
  request.mutable_inputs(0)->set_datatype("INT32");
  EXPECT_THAT(Refused(request), HasSubstr("'INT32' is not BYTES"));
  request = Request("llama", "hello");
  request.add_outputs()->set_name("logits");
  EXPECT_THAT(Refused(request), HasSubstr("'logits' is not text_output"));
  request = Request("llama", "hello");
  request.clear_inputs();
  request.clear_raw_input_contents();
  EXPECT_THAT(Refused(request), HasSubstr("text_input: missing"));
  request = Request("llama", "hello");
  request.mutable_inputs(0)->add_shape(7);
  EXPECT_THAT(Refused(request), HasSubstr("text_input: shape [1, 7]"));
  request = Request("llama", "hello");
  *request.add_inputs() = request.inputs(0);
  request.add_raw_input_contents(Raw("other"));
  EXPECT_THAT(Refused(request), HasSubstr("text_input is there twice"));
  for (const char* known : {"model", "prompt"}) {
    request = Request("llama", "hello");
    (*request.mutable_parameters())[known].set_string_param("style");
    EXPECT_THAT(Refused(request), HasSubstr(absl::StrCat(known, ": not for parameters")));
  }
  inference::RepositoryModelUnloadRequest unload;
  unload.set_model_name("style");
  unload.set_repository_name("other");
  inference::RepositoryModelUnloadResponse unloaded;
  grpc::ClientContext unloading;
  EXPECT_THAT(stub_->RepositoryModelUnload(&unloading, unload, &unloaded).error_message(),
              HasSubstr("repository_name: 'other'"));
}

}  // namespace
}  // namespace lorikeet
