#include "server/grpc/adapter_upload.h"

#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"
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

AdapterUpload* AdapterUpload::Start(AdapterAdmin* admin, absl::StatusOr<Client> client,
                                    grpc::ByteBuffer* response) {
  if (!client.ok()) {
    auto* upload = new AdapterUpload(admin, {}, response);
    upload->Finish(ToGrpcStatus(client.status()));
    return upload;
  }
  auto* upload = new AdapterUpload(admin, *std::move(client), response);
  upload->StartRead(&upload->bytes_);
  return upload;
}

void AdapterUpload::OnReadDone(bool ok) {
  if (ok) {
    v1::UploadAdapterRequest part;
    absl::Status status = DecodeRequest(bytes_, &part);
    if (status.ok()) status = Take(std::move(part));
    if (!status.ok()) return Fail(status);
    return StartRead(&bytes_);
  }
  const absl::StatusOr<fs::path> path = Complete();
  if (!path.ok()) return Fail(path.status());
  admin_->LoadUploaded(client_, header_, *path,
                       [this](const absl::StatusOr<v1::LoadAdapterResponse>& reply) {
                         if (reply.ok()) *response_ = EncodeResponse(*reply);
                         End(reply.status());
                       });
}

// Before there is anything to load.
void AdapterUpload::Fail(const absl::Status& status) {
  admin_->CountLoad(status, start_);
  admin_->Note(client_, "UploadAdapter", header_.name(), status);
  End(status);
}

void AdapterUpload::End(const absl::Status& status) {
  std::error_code ignored;
  if (!scratch_.empty()) fs::remove_all(scratch_, ignored);
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
  LK_RETURN_IF_ERROR(AdapterAdmin::CheckMayName(*client_.caller, header.name()));
  LK_RETURN_IF_ERROR(CheckDigits("weights_sha256", header.weights_sha256()));
  LK_RETURN_IF_ERROR(CheckDigits("config_sha256", header.config_sha256()));
  if (header.weights_bytes() < 1 || header.weights_bytes() > Limits::kMaxAdapterFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat("weights_bytes: ", header.weights_bytes(),
                                                   " is not in [1, ",
                                                   Limits::kMaxAdapterFileBytes, "]"));
  }
  if (admin_->uploads() == nullptr) {
    return absl::FailedPreconditionError(
        "this server has no directory to keep uploads in; it is started with --adapter-dir");
  }
  LK_ASSIGN_OR_RETURN(scratch_, admin_->uploads()->Scratch());
  header_ = header;
  begun_ = true;
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
  return admin_->uploads()->Keep(
      scratch_, absl::StrCat(header_.config_sha256(), "-", header_.weights_sha256()));
}

}  // namespace lorikeet
