#include "server/grpc/adapter_upload.h"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "adapters_cache/formats/adapter_files.h"
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

absl::Status CheckDigits(const std::string& file, const std::string& sha256) {
  if (sha256.size() == kHashDigits &&
      sha256.find_first_not_of("0123456789abcdef") == std::string::npos) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("the header's SHA-256 of ", file, " is not ",
                                                 kHashDigits, " lower-case hexadecimal digits"));
}

absl::Status CheckTextName(const std::string& name) {
  if (std::ranges::count(AdapterTextNames(), name) > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("text_sha256: an adapter has no '", name.substr(0, 64), "'; it may have ",
                   absl::StrJoin(AdapterTextNames(), ", ")));
}

}  // namespace

AdapterUpload* AdapterUpload::Start(AdapterAdmin* admin, boost::asio::thread_pool* disk,
                                    absl::StatusOr<Client> client, grpc::ByteBuffer* response) {
  if (!client.ok()) {
    auto* upload = new AdapterUpload(admin, disk, {}, response);
    upload->Finish(ToGrpcStatus(client.status()));
    return upload;
  }
  auto* upload = new AdapterUpload(admin, disk, *std::move(client), response);
  upload->StartRead(&upload->bytes_);
  return upload;
}

void AdapterUpload::OnReadDone(bool ok) {
  boost::asio::post(*disk_, [this, ok] { ok ? TakePart() : TakeEnd(); });
}

void AdapterUpload::TakePart() {
  v1::UploadAdapterRequest part;
  absl::Status status = DecodeRequest(bytes_, &part);
  if (status.ok()) status = Take(std::move(part));
  if (!status.ok()) return Fail(status);
  StartRead(&bytes_);
}

void AdapterUpload::TakeEnd() {
  const absl::StatusOr<fs::path> path = Complete();
  if (!path.ok()) return Fail(path.status());
  admin_->LoadUploaded(client_, header_, *path, room_.get(),
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
  room_.reset();
  Finish(ToGrpcStatus(status));
}

absl::Status AdapterUpload::Take(v1::UploadAdapterRequest part) {
  if (part.part_case() == v1::UploadAdapterRequest::kHeader) return Begin(part.header());
  if (!begun_) return absl::InvalidArgumentError("the first message of an upload is its header");
  switch (part.part_case()) {
    case v1::UploadAdapterRequest::kConfig:
      return Append(kConfigName, part.config());
    case v1::UploadAdapterRequest::kWeights:
      return Append(kWeightsName, part.weights());
    case v1::UploadAdapterRequest::kText:
      return Append(part.text().name(), part.text().piece());
    default:
      return absl::InvalidArgumentError("a message of an upload is empty");
  }
}

absl::Status AdapterUpload::Begin(const v1::UploadHeader& header) {
  if (begun_) return absl::InvalidArgumentError("an upload has one header");
  LK_RETURN_IF_ERROR(AdapterAdmin::CheckMayName(*client_.caller, header.name()));
  if (header.weights_bytes() < 1 || header.weights_bytes() > Limits::kMaxAdapterFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat("weights_bytes: ", header.weights_bytes(),
                                                   " is not in [1, ",
                                                   Limits::kMaxAdapterFileBytes, "]"));
  }
  if (admin_->uploads() == nullptr) {
    return absl::FailedPreconditionError(
        "this server has no directory to keep uploads in; it is started with --adapter-dir");
  }
  room_ = admin_->DiskRoomFor(client_, header.name());
  LK_RETURN_IF_ERROR(room_->Take(header.weights_bytes()));
  LK_ASSIGN_OR_RETURN(scratch_, admin_->uploads()->Scratch());
  LK_RETURN_IF_ERROR(Expect(kConfigName, kMaxConfigBytes, header.config_sha256()));
  LK_RETURN_IF_ERROR(Expect(kWeightsName, header.weights_bytes(), header.weights_sha256()));
  for (const auto& [name, sha256] : header.text_sha256()) {
    LK_RETURN_IF_ERROR(CheckTextName(name));
    LK_RETURN_IF_ERROR(Expect(name, kMaxAdapterTextBytes, sha256));
  }
  header_ = header;
  begun_ = true;
  return absl::OkStatus();
}

absl::Status AdapterUpload::Expect(const std::string& name, int64_t most,
                                   const std::string& sha256) {
  LK_RETURN_IF_ERROR(CheckDigits(name, sha256));
  File& file = files_[name];
  file.most = most;
  file.wanted = sha256;
  std::error_code ignored;
  fs::create_directories((scratch_ / name).parent_path(), ignored);
  file.out.open(scratch_ / name, std::ios::binary);
  return absl::OkStatus();
}

absl::Status AdapterUpload::Append(const std::string& name, const std::string& bytes) {
  const auto found = files_.find(name);
  if (found == files_.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("text: the header has no '", name.substr(0, 64), "'"));
  }
  File& file = found->second;
  file.bytes += static_cast<int64_t>(bytes.size());
  if (file.bytes > file.most) {
    return absl::DataLossError(absl::StrCat(name, " has more than ", file.most, " bytes"));
  }
  if (name != kWeightsName) LK_RETURN_IF_ERROR(room_->Take(static_cast<int64_t>(bytes.size())));
  file.hash.Add(bytes);
  if (file.out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(absl::StrCat("cannot write ", name, " after ", file.bytes,
                                                   " bytes: is the disk full?"));
}

// The files in their place.
absl::StatusOr<fs::path> AdapterUpload::Complete() {
  if (!begun_) return absl::InvalidArgumentError("an upload begins with its header");
  const File& weights = files_.at(kWeightsName);
  if (weights.bytes < weights.most) {
    return absl::DataLossError(absl::StrCat(kWeightsName, " has ", weights.bytes,
                                            " bytes; the header says ", weights.most));
  }
  std::string folder = absl::StrCat(header_.config_sha256(), "-", header_.weights_sha256());
  Sha256 texts;
  for (auto& [name, file] : files_) {
    const std::string hash = file.hash.Hex();
    if (hash != file.wanted) {
      return absl::DataLossError(
          absl::StrCat(name, " has SHA-256 ", hash, "; the header says ", file.wanted));
    }
    texts.Add(absl::StrCat(name, " ", hash, "\n"));
    file.out.close();
    if (!file.out) return absl::ResourceExhaustedError("cannot write the files: disk full?");
  }
  if (header_.text_sha256_size() > 0) absl::StrAppend(&folder, "-", texts.Hex());
  return admin_->uploads()->Keep(scratch_, folder);
}

}  // namespace lorikeet
