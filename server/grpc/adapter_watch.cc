#include "server/grpc/adapter_watch.h"

#include <utility>

#include "server/adapter_proto.h"
#include "server/grpc/wire.h"

namespace lorikeet {

AdapterWatchCall* AdapterWatchCall::Start(const AdapterAdmin* admin,
                                          const absl::StatusOr<Client>& client,
                                          FrontThread* front) {
  auto call = std::make_shared<AdapterWatchCall>();
  call->self_ = call;
  if (!client.ok()) {
    std::lock_guard lock(call->mutex_);
    call->End(client.status());
    return call.get();
  }
  call->watch_ = admin->Watch(client->caller, [weak = call->weak_from_this(), front] {
    front->Post([weak] {
      if (const auto self = weak.lock()) self->Pump();
    });
  });
  call->StartSendInitialMetadata();
  return call.get();
}

void AdapterWatchCall::Pump() {
  std::lock_guard lock(mutex_);
  if (writing_ || finished_) return;
  AdapterEvent event;
  const absl::StatusOr<bool> there = watch_->Next(&event);
  if (!there.ok()) return End(there.status());
  if (!*there) return;
  message_ = ToProto(event);
  writing_ = true;
  StartWrite(&message_);
}

void AdapterWatchCall::OnWriteDone(bool ok) {
  {
    std::lock_guard lock(mutex_);
    writing_ = false;
    if (!ok) return End(absl::CancelledError("the client is gone"));
  }
  Pump();
}

void AdapterWatchCall::OnCancel() {
  std::lock_guard lock(mutex_);
  End(absl::CancelledError("the client closed the call"));
}

void AdapterWatchCall::End(const absl::Status& status) {
  if (!std::exchange(finished_, true)) Finish(ToGrpcStatus(status));
}

}  // namespace lorikeet
