// Bytes, protos and statuses at the gRPC edge.
//
// Requests are parsed here and not by gRPC, which answers a message that does not parse, a string
// that is not UTF-8 included, with a status that says nothing about it.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace lorikeet {

// INVALID_ARGUMENT: malformed, or a string field that is not UTF-8, by name and byte offset.
absl::Status DecodeRequest(const grpc::ByteBuffer& bytes, google::protobuf::Message* request);

grpc::ByteBuffer EncodeResponse(const google::protobuf::Message& response);

// The same code; a message too long for a response header is cut.
grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace lorikeet
