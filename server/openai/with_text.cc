#include "server/openai/with_text.h"

#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "engine/base/status_macros.h"
#include "server/adapter_texts.h"
#include "server/http/errors.h"

namespace lorikeet {
namespace {

struct Slot {
  std::mutex mutex;
  std::optional<absl::StatusOr<AdapterLease>> lease;
};

// Waits for the lease. Made on the connection's thread, or elsewhere where the request is long.
class Waiting final : public HttpAnswer {
 public:
  using Make = std::function<HttpOutcome(const absl::StatusOr<AdapterLease>& lease)>;

  Waiting(const HttpCall& call, std::shared_ptr<Slot> slot, Make make)
      : elsewhere_(call.request.elsewhere), slot_(std::move(slot)), make_(std::move(make)) {}

  void Pump(HttpWriter& writer) override {
    if (answer_ == nullptr) answer_ = Begin();
    if (answer_ != nullptr) answer_->Pump(writer);
  }

 private:
  std::unique_ptr<HttpAnswer> Begin() {
    std::unique_lock lock(slot_->mutex);
    if (!slot_->lease) return nullptr;
    HttpBegin begin = [make = std::move(make_), lease = *std::move(slot_->lease)] {
      HttpOutcome made = make(lease);
      if (made.ok()) return *std::move(made);
      return std::unique_ptr<HttpAnswer>(std::make_unique<HttpReply>(ErrorResponse(made.status())));
    };
    lock.unlock();
    return elsewhere_ ? elsewhere_(std::move(begin)) : begin();
  }

  const std::function<std::unique_ptr<HttpAnswer>(HttpBegin)> elsewhere_;
  const std::shared_ptr<Slot> slot_;
  Make make_;
  std::unique_ptr<HttpAnswer> answer_;
};

}  // namespace

HttpOutcome WithText(const ServingContext& context, ResolvedModel model, const HttpCall& call,
                     std::function<HttpOutcome(const ModelText& text)> make) {
  if (model.terms.empty()) return make(context.text);
  const std::vector<WeightedAdapter> terms = model.terms;
  Waiting::Make with_lease = [&context, model = std::move(model), make = std::move(make)](
                                 const absl::StatusOr<AdapterLease>& lease) -> HttpOutcome {
    LK_RETURN_IF_ERROR(lease.status());
    LK_RETURN_IF_ERROR(CheckVersion(model, lease->version()));
    return make(TextOf(context.text, lease->get()));
  };
  auto slot = std::make_shared<Slot>();
  context.mixer->AcquireAsync(terms, [slot, wake = call.wake](absl::StatusOr<AdapterLease> lease) {
    {
      std::lock_guard lock(slot->mutex);
      slot->lease = std::move(lease);
    }
    wake();
  });
  return std::make_unique<Waiting>(call, std::move(slot), std::move(with_lease));
}

}  // namespace lorikeet
