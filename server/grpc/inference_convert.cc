#include "server/grpc/inference_convert.h"

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"
#include "server/openai/request.h"

namespace lorikeet {
namespace {

using inference::InferParameter;
using inference::ModelInferRequest;

constexpr char kText[] = "text_input";
constexpr char kOutput[] = "text_output";
constexpr char kSampling[] = "sampling_parameters";
constexpr char kStream[] = "stream";

// The elements of a BYTES tensor's raw form.
absl::StatusOr<std::vector<std::string>> RawElements(const std::string& raw,
                                                     const std::string& name) {
  std::vector<std::string> elements;
  for (size_t at = 0; at < raw.size();) {
    uint32_t bytes = 0;
    if (raw.size() - at < sizeof bytes) return FieldError(name, "its raw contents are cut short");
    std::memcpy(&bytes, &raw[at], sizeof bytes);
    at += sizeof bytes;
    if (raw.size() - at < bytes) return FieldError(name, "its raw contents are cut short");
    elements.push_back(raw.substr(at, bytes));
    at += bytes;
  }
  return elements;
}

absl::Status CheckShape(const ModelInferRequest::InferInputTensor& tensor) {
  for (const int64_t dimension : tensor.shape()) {
    if (dimension == 1) continue;
    return FieldError(tensor.name(), absl::StrCat("shape [", absl::StrJoin(tensor.shape(), ", "),
                                                  "]; one element"));
  }
  return absl::OkStatus();
}

// The one text of input `index`.
absl::StatusOr<std::string> OneText(const ModelInferRequest& request, int index) {
  const ModelInferRequest::InferInputTensor& tensor = request.inputs(index);
  if (tensor.datatype() != "BYTES") {
    return FieldError(tensor.name(), absl::StrCat("'", tensor.datatype(), "' is not BYTES"));
  }
  LK_RETURN_IF_ERROR(CheckShape(tensor));
  const auto& contents = tensor.contents().bytes_contents();
  std::vector<std::string> elements(contents.begin(), contents.end());
  if (request.raw_input_contents_size() > 0) {
    LK_ASSIGN_OR_RETURN(elements, RawElements(request.raw_input_contents(index), tensor.name()));
  }
  if (elements.size() == 1) return elements[0];
  return FieldError(tensor.name(), absl::StrCat(elements.size(), " texts; exactly one"));
}

absl::StatusOr<bool> OneBool(const ModelInferRequest& request, int index) {
  const ModelInferRequest::InferInputTensor& tensor = request.inputs(index);
  LK_RETURN_IF_ERROR(CheckShape(tensor));
  const bool raw = request.raw_input_contents_size() > 0;
  const auto& contents = tensor.contents().bool_contents();
  const size_t size = raw ? request.raw_input_contents(index).size() : contents.size();
  if (tensor.datatype() != "BOOL" || size != 1) return FieldError(tensor.name(), "not one BOOL");
  return raw ? request.raw_input_contents(index)[0] != 0 : contents[0];
}

Json ToJson(const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kBoolParam:
      return parameter.bool_param();
    case InferParameter::kInt64Param:
      return parameter.int64_param();
    case InferParameter::kStringParam:
      return parameter.string_param();
    case InferParameter::kDoubleParam:
      return parameter.double_param();
    case InferParameter::kUint64Param:
      return parameter.uint64_param();
    case InferParameter::PARAMETER_CHOICE_NOT_SET:
      break;
  }
  return nullptr;
}

// A field of a completion's body that the client says beside the inputs.
absl::Status AddField(const std::string& name, Json value, Json* body) {
  if (name == "model" || name == "prompt") {
    return FieldError(name, "not for parameters; the request has it already");
  }
  if (body->contains(name)) return FieldError(name, "given twice");
  (*body)[name] = std::move(value);
  return absl::OkStatus();
}

// Adds what is in the tensor `index` to the body of a completion.
absl::Status AddInput(const ModelInferRequest& request, int index, Json* body, bool* stream) {
  const std::string& name = request.inputs(index).name();
  for (int before = 0; before < index; ++before) {
    if (request.inputs(before).name() == name) return FieldError("inputs", name + " is there twice");
  }
  if (name == kText) {
    LK_ASSIGN_OR_RETURN((*body)["prompt"], OneText(request, index));
  } else if (name == kStream) {
    LK_ASSIGN_OR_RETURN(*stream, OneBool(request, index));
  } else if (name == kSampling) {
    LK_ASSIGN_OR_RETURN(const std::string text, OneText(request, index));
    LK_ASSIGN_OR_RETURN(const Json more, ParseBody(text));
    for (const auto& [field, value] : more.items()) LK_RETURN_IF_ERROR(AddField(field, value, body));
  } else {
    return FieldError("inputs", absl::StrCat("'", name, "' is none of ", kText, ", ", kSampling,
                                             " and ", kStream));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GenerationInput> ToInput(const ModelInferRequest& request, bool* stream) {
  if (request.raw_input_contents_size() > 0 &&
      request.raw_input_contents_size() != request.inputs_size()) {
    return FieldError("raw_input_contents", absl::StrCat(request.raw_input_contents_size(),
                                                         "; the inputs are ",
                                                         request.inputs_size()));
  }
  for (const auto& output : request.outputs()) {
    if (output.name() != kOutput) {
      return FieldError("outputs", absl::StrCat("'", output.name(), "' is not ", kOutput));
    }
  }
  Json body = Json::object();
  for (int i = 0; i < request.inputs_size(); ++i) {
    LK_RETURN_IF_ERROR(AddInput(request, i, &body, stream));
  }
  if (!body.contains("prompt")) return FieldError(kText, "missing");
  for (const auto& [name, parameter] : request.parameters()) {
    if (name.starts_with("triton_")) continue;  // Triton's client to itself
    LK_RETURN_IF_ERROR(AddField(name, ToJson(parameter), &body));
  }
  body["model"] = request.model_version().empty()
                      ? request.model_name()
                      : request.model_name() + "@" + request.model_version();
  LK_ASSIGN_OR_RETURN(OpenAiRequest parsed, ParseCompletion(body));
  if (parsed.output.stream || parsed.output.logprobs || parsed.output.echo ||
      parsed.output.prompt_logprobs) {
    return absl::InvalidArgumentError(
        "parameters: none of stream, logprobs, prompt_logprobs and echo has a place in the answer");
  }
  return std::move(parsed.inputs.front());
}

inference::ModelInferResponse ResponseTo(const ModelInferRequest& request) {
  inference::ModelInferResponse response;
  response.set_model_name(request.model_name());
  response.set_model_version(request.model_version());
  response.set_id(request.id());
  return response;
}

void SetTexts(const std::vector<std::string>& texts, inference::ModelInferResponse* response) {
  inference::ModelInferResponse::InferOutputTensor* output = response->add_outputs();
  output->set_name(kOutput);
  output->set_datatype("BYTES");
  output->add_shape(static_cast<int64_t>(texts.size()));
  std::string* raw = response->add_raw_output_contents();
  for (const std::string& text : texts) {
    const auto bytes = static_cast<uint32_t>(text.size());
    raw->append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    raw->append(text);
  }
}

void SetEnd(const GenerationEnd& end, inference::ModelInferResponse* response) {
  if (!end.adapter_version.empty()) response->set_model_version(end.adapter_version);
  auto& parameters = *response->mutable_parameters();
  parameters["finish_reason"].set_string_param(end.length ? "length" : "stop");
  parameters["prompt_tokens"].set_int64_param(end.prompt_tokens);
  parameters["completion_tokens"].set_int64_param(end.completion_tokens);
}

absl::Status CheckRepository(const std::string& name) {
  if (name.empty()) return absl::OkStatus();
  return FieldError("repository_name", absl::StrCat("'", name, "'; there is one, without a name"));
}

absl::StatusOr<v1::LoadAdapterRequest> ToLoad(
    const inference::RepositoryModelLoadRequest& request) {
  LK_RETURN_IF_ERROR(CheckRepository(request.repository_name()));
  v1::LoadAdapterRequest load;
  load.set_name(request.model_name());
  load.set_path(request.model_name());
  load.set_replace(true);
  for (const auto& [name, parameter] : request.parameters()) {
    if (name == "path") {
      load.set_path(parameter.string_param());
    } else if (name == "config") {
      LK_ASSIGN_OR_RETURN(const Json config, ParseBody(parameter.string_param()));
      Fields fields(config, "config.");
      fields.Read("path", load.mutable_path());
      LK_RETURN_IF_ERROR(fields.Finish());
    } else {
      return FieldError("parameters", absl::StrCat("'", name, "' is neither path nor config"));
    }
  }
  return load;
}

}  // namespace lorikeet
