#include "server/grpc/wire.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/unknown_field_set.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "server/text/utf8.h"

namespace lorikeet {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

// A response header holds 8 KiB, and every byte that is not printable ASCII takes three there.
constexpr size_t kMaxStatusBytes = 2000;

// Looks for the string field that is not UTF-8 in a message of type `type`, given as raw fields.
absl::Status CheckStrings(const Descriptor& type, const UnknownFieldSet& fields,
                          const std::string& prefix) {
  for (int i = 0; i < fields.field_count(); ++i) {
    const UnknownField& field = fields.field(i);
    const FieldDescriptor* known = type.FindFieldByNumber(field.number());
    if (known == nullptr || field.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    const std::string name = prefix + known->name();
    if (known->type() == FieldDescriptor::TYPE_STRING) {
      LK_RETURN_IF_ERROR(ValidateUtf8(field.length_delimited(), name));
    } else if (known->type() == FieldDescriptor::TYPE_MESSAGE) {
      UnknownFieldSet inner;
      if (!inner.ParseFromString(field.length_delimited())) continue;
      LK_RETURN_IF_ERROR(CheckStrings(*known->message_type(), inner, name + "."));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status DecodeRequest(const grpc::ByteBuffer& bytes, Message* request) {
  std::vector<grpc::Slice> slices;
  if (!bytes.Dump(&slices).ok()) return absl::InvalidArgumentError("the request has no body");
  std::string raw;
  raw.reserve(bytes.Length());
  for (const grpc::Slice& slice : slices) {
    raw.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  if (request->ParseFromString(raw)) return absl::OkStatus();
  UnknownFieldSet fields;
  if (fields.ParseFromString(raw)) {
    LK_RETURN_IF_ERROR(CheckStrings(*request->GetDescriptor(), fields, ""));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("the request is not a well-formed ", request->GetTypeName(), " message"));
}

grpc::ByteBuffer EncodeResponse(const Message& response) {
  grpc::ByteBuffer bytes;
  bool own = false;
  const grpc::Status status = grpc::SerializationTraits<Message>::Serialize(response, &bytes, &own);
  LK_CHECK_MSG(status.ok(), status.error_message());
  return bytes;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kMaxStatusBytes) {
    size_t end = kMaxStatusBytes;
    while (end > 0 && (message[end] & 0xC0) == 0x80) --end;  // not inside a character
    message = message.substr(0, end) + " ...";
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace lorikeet
