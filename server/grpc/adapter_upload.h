// UploadAdapter: an adapter's files as they come, then a load of them.
#pragma once

#include <boost/asio/thread_pool.hpp>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "adapters_cache/sha256.h"
#include "lorikeet/v1/adapters.grpc.pb.h"
#include "server/adapter_admin.h"

namespace lorikeet {

// The files go to a folder of their own (AdapterAdmin::uploads), named by their hashes once they
// are complete; an upload that fails leaves nothing.
class AdapterUpload final : public grpc::ServerReadReactor<grpc::ByteBuffer> {
 public:
  // Lives until gRPC is done with it, which `disk`, whose threads take the files, outlives. Ends at once if
  // there is no client who may.
  static AdapterUpload* Start(AdapterAdmin* admin, boost::asio::thread_pool* disk,
                              absl::StatusOr<Client> client, grpc::ByteBuffer* response);

  void OnReadDone(bool ok) override;
  void OnDone() override { delete this; }

 private:
  struct File {
    std::ofstream out;
    Sha256 hash;
    std::string wanted;  // its hash
    int64_t bytes = 0;
    int64_t most = 0;
  };

  AdapterUpload(AdapterAdmin* admin, boost::asio::thread_pool* disk, Client client,
                grpc::ByteBuffer* response)
      : admin_(admin), disk_(disk), client_(std::move(client)), response_(response) {}

  void TakePart();
  void TakeEnd();
  absl::Status Take(v1::UploadAdapterRequest part);
  absl::Status Begin(const v1::UploadHeader& header);
  absl::Status Expect(const std::string& name, int64_t most, const std::string& sha256);
  absl::Status Append(const std::string& name, const std::string& bytes);
  absl::StatusOr<std::filesystem::path> Complete();
  void Fail(const absl::Status& status);
  void End(const absl::Status& status);

  AdapterAdmin* const admin_;
  boost::asio::thread_pool* const disk_;
  const Client client_;
  grpc::ByteBuffer* const response_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  grpc::ByteBuffer bytes_;  // being read
  v1::UploadHeader header_;
  bool begun_ = false;
  std::filesystem::path scratch_;  // empty: nothing to remove
  std::unique_ptr<AdapterRegistry::DiskRoom> room_;  // of the weights, and of the other files as they come
  std::map<std::string, File> files_;  // by name
};

}  // namespace lorikeet
