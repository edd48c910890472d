#include "server/tracing/span_exporter.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/version.h"

namespace lorikeet {
namespace {

namespace otlp = opentelemetry::proto;

constexpr auto kLinger = std::chrono::milliseconds(500);  // for more spans to send at once
constexpr auto kSend = std::chrono::seconds(5);           // then spans are dropped
constexpr auto kFlush = std::chrono::seconds(2);          // at the end

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "";
}

void Describe(otlp::trace::v1::ResourceSpans* spans) {
  otlp::resource::v1::Resource* resource = spans->mutable_resource();
  SetAttribute("service.name", "lorikeet", resource);
  SetAttribute("service.version", kVersion, resource);
  SetAttribute("service.instance.id", absl::StrCat(HostName(), ":", getpid()), resource);
  SetAttribute("host.name", HostName(), resource);
  auto* scope = spans->add_scope_spans()->mutable_scope();
  scope->set_name("lorikeet");
  scope->set_version(kVersion);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SpanExporter>> SpanExporter::Start(const std::string& endpoint) {
  std::string target = endpoint;
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (target.starts_with("https://")) {
    credentials = grpc::SslCredentials({});
    target.erase(0, 8);
  } else if (target.starts_with("http://")) {
    target.erase(0, 7);
  }
  const size_t colon = target.rfind(':');
  if (colon == 0 || colon == target.npos || colon + 1 == target.size() ||
      target.find_first_not_of("0123456789", colon + 1) != target.npos) {
    return absl::InvalidArgumentError(absl::StrCat(
        "otlp-endpoint: '", endpoint, "' is not HOST:PORT, http://HOST:PORT or https://HOST:PORT"));
  }
  return std::unique_ptr<SpanExporter>(
      new SpanExporter(Service::NewStub(grpc::CreateChannel(target, credentials))));
}

SpanExporter::SpanExporter(std::unique_ptr<Service::Stub> stub)
    : stub_(std::move(stub)), thread_([this] { Run(); }) {}

SpanExporter::~SpanExporter() {
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
    changed_.wait_for(lock, kFlush, [this] { return done_; });
    if (sending_ != nullptr) sending_->TryCancel();
  }
  thread_.join();
}

void SpanExporter::Add(std::vector<OtlpSpan> spans) {
  {
    std::lock_guard lock(mutex_);
    const size_t room = kMostQueued - queued_.size();
    const size_t taken = std::min(room, spans.size());
    std::move(spans.begin(), spans.begin() + taken, std::back_inserter(queued_));
    counts_.dropped += static_cast<int64_t>(spans.size() - taken);
  }
  changed_.notify_one();
}

SpanCounts SpanExporter::counts() const {
  std::lock_guard lock(mutex_);
  return counts_;
}

void SpanExporter::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !queued_.empty(); });
    if (queued_.empty()) break;
    changed_.wait_for(lock, kLinger,
                      [this] { return stopping_ || queued_.size() >= kMostAtOnce; });
    const auto end = queued_.begin() + std::min(queued_.size(), kMostAtOnce);
    std::vector<OtlpSpan> batch(std::make_move_iterator(queued_.begin()),
                                std::make_move_iterator(end));
    queued_.erase(queued_.begin(), end);
    const auto count = static_cast<int64_t>(batch.size());
    grpc::ClientContext context;
    sending_ = &context;
    lock.unlock();
    const bool sent = Send(std::move(batch), &context);
    lock.lock();
    sending_ = nullptr;
    (sent ? counts_.exported : counts_.dropped) += count;
    if (stopping_ && !sent) break;
  }
  done_ = true;
  changed_.notify_all();
}

bool SpanExporter::Send(std::vector<OtlpSpan> spans, grpc::ClientContext* context) {
  otlp::collector::trace::v1::ExportTraceServiceRequest request;
  auto* all = request.add_resource_spans();
  Describe(all);
  for (OtlpSpan& span : spans) *all->mutable_scope_spans(0)->add_spans() = std::move(span);
  context->set_wait_for_ready(true);  // the collector may be on its way back
  context->set_deadline(std::chrono::system_clock::now() + kSend);
  otlp::collector::trace::v1::ExportTraceServiceResponse response;
  return stub_->Export(context, request, &response).ok();
}

}  // namespace lorikeet
