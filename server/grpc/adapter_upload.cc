#include "server/grpc/adapter_upload.h"

#include <unistd.h>

#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
#include "server/grpc/convert.h"
#include "server/grpc/wire.h"

namespace lorikeet {
namespace {

namespace fs = std::filesystem;

constexpr char kConfigName[] = "adapter_config.json";
constexpr char kWeightsName[] = "adapter_model.safetensors";
constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr size_t kHashDigits = 64;

absl::Status CheckHash(const char* file, const std::string& wanted, const std::string& found) {
  if (wanted == found) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(file, " has SHA-256 ", found, "; the header says ", wanted));
}

absl::Status CheckDigits(const char* field, const std::string& hash) {
  if (hash.size() == kHashDigits &&
      hash.find_first_not_of("0123456789abcdef") == std::string::npos) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": not ", kHashDigits, " lower-case hexadecimal digits"));
}

}  // namespace

AdapterUpload* AdapterUpload::Start(AdapterRegistry* registry, Metrics* metrics,
                                    const fs::path& directory, grpc::ByteBuffer* response) {
  auto* upload = new AdapterUpload(registry, metrics, directory, response);
  upload->StartRead(&upload->bytes_);
  return upload;
}

AdapterUpload::AdapterUpload(AdapterRegistry* registry, Metrics* metrics, fs::path directory,
                             grpc::ByteBuffer* response)
    : registry_(registry),
      metrics_(metrics),
      directory_(std::move(directory)),
      response_(response) {}

void AdapterUpload::OnReadDone(bool ok) {
  if (ok) {
    v1::UploadAdapterRequest part;
    absl::Status status = DecodeRequest(bytes_, &part);
    if (status.ok()) status = Take(std::move(part));
    if (!status.ok()) return End(status);
    return StartRead(&bytes_);
  }
  const absl::StatusOr<fs::path> path = Complete();
  if (!path.ok()) return End(path.status());
  registry_->LoadAsync(header_.name(), *path,
                       {.origin = AdapterRegistry::Origin::kOperator,
                        .replace = header_.replace(),
                        .pin = header_.pin()},
                       [this](const absl::StatusOr<AdapterInfo>& info) {
                         if (info.ok()) {
                           v1::LoadAdapterResponse reply;
                           *reply.mutable_adapter() = ToProto(*info);
                           *response_ = EncodeResponse(reply);
                         }
                         End(info.status());
                       });
}

void AdapterUpload::End(const absl::Status& status) {
  std::error_code ignored;
  if (!scratch_.empty()) fs::remove_all(scratch_, ignored);
  metrics_->OnAdapterLoad(status, std::chrono::duration_cast<std::chrono::microseconds>(
                                      std::chrono::steady_clock::now() - start_)
                                      .count());
  Finish(ToGrpcStatus(status));
}

absl::Status AdapterUpload::Take(v1::UploadAdapterRequest part) {
  if (part.part_case() == v1::UploadAdapterRequest::kHeader) return Begin(part.header());
  if (!begun_) return absl::InvalidArgumentError("the first message of an upload is its header");
  switch (part.part_case()) {
    case v1::UploadAdapterRequest::kConfig:
      return Append(&config_, kConfigName, part.config());
    case v1::UploadAdapterRequest::kWeights:
      return Append(&weights_, kWeightsName, part.weights());
    default:
      return absl::InvalidArgumentError("a message of an upload is empty");
  }
}

absl::Status AdapterUpload::Begin(const v1::UploadHeader& header) {
  if (begun_) return absl::InvalidArgumentError("an upload has one header");
  if (directory_.empty()) {
    return absl::FailedPreconditionError(
        "this server has no directory to keep uploads in; it is started with --adapter-dir");
  }
  LK_RETURN_IF_ERROR(CheckDigits("weights_sha256", header.weights_sha256()));
  LK_RETURN_IF_ERROR(CheckDigits("config_sha256", header.config_sha256()));
  if (header.weights_bytes() < 1 || header.weights_bytes() > Limits::kMaxAdapterFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat("weights_bytes: ", header.weights_bytes(),
                                                   " is not in [1, ",
                                                   Limits::kMaxAdapterFileBytes, "]"));
  }
  header_ = header;
  begun_ = true;
  std::error_code error;
  fs::create_directories(directory_ / "uploads", error);
  std::string pattern = (directory_ / "uploads" / "partial-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot write below ", directory_.string()));
  }
  scratch_ = pattern;
  config_.most = kMaxConfigBytes;
  weights_.most = header.weights_bytes();
  config_.out.open(scratch_ / kConfigName, std::ios::binary);
  weights_.out.open(scratch_ / kWeightsName, std::ios::binary);
  return absl::OkStatus();
}

absl::Status AdapterUpload::Append(File* file, const char* name, const std::string& bytes) {
  file->bytes += static_cast<int64_t>(bytes.size());
  if (file->bytes > file->most) {
    return absl::DataLossError(absl::StrCat(name, " has more than ", file->most, " bytes"));
  }
  file->hash.Add(bytes);
  if (file->out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(absl::StrCat("cannot write ", name, " after ",
                                                   file->bytes, " bytes: is the disk full?"));
}

// The files in their place.
absl::StatusOr<fs::path> AdapterUpload::Complete() {
  if (!begun_) return absl::InvalidArgumentError("an upload begins with its header");
  if (weights_.bytes < weights_.most) {
    return absl::DataLossError(absl::StrCat(kWeightsName, " has ", weights_.bytes,
                                            " bytes; the header says ", weights_.most));
  }
  LK_RETURN_IF_ERROR(CheckHash(kConfigName, header_.config_sha256(), config_.hash.Hex()));
  LK_RETURN_IF_ERROR(CheckHash(kWeightsName, header_.weights_sha256(), weights_.hash.Hex()));
  for (File* file : {&config_, &weights_}) {
    file->out.close();
    if (!file->out) return absl::ResourceExhaustedError("cannot write the files: disk full?");
  }
  const fs::path place = directory_ / "uploads" /
                         absl::StrCat(header_.config_sha256().substr(0, 16), "-",
                                      header_.weights_sha256().substr(0, 48));
  std::error_code error;
  fs::rename(scratch_, place, error);
  if (!error) {
    scratch_.clear();
  } else if (!fs::exists(place)) {  // else the same files are there already
    return absl::UnavailableError(absl::StrCat("cannot keep the files: ", error.message()));
  }
  return place;
}

}  // namespace lorikeet
