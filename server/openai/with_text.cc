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

class Waiting final : public HttpAnswer {
 public:
  using Make = std::function<HttpOutcome(absl::StatusOr<AdapterLease> lease)>;

  Waiting(std::shared_ptr<Slot> slot, Make make) : slot_(std::move(slot)), make_(std::move(make)) {}

  void Pump(HttpWriter& writer) override {
    if (!answer_) {
      std::unique_lock lock(slot_->mutex);
      if (!slot_->lease) return;
      absl::StatusOr<AdapterLease> lease = *std::move(slot_->lease);
      lock.unlock();
      HttpOutcome made = make_(std::move(lease));
      if (!made.ok()) return writer.Reply(ErrorResponse(made.status()));
      answer_ = *std::move(made);
    }
    answer_->Pump(writer);
  }

 private:
  const std::shared_ptr<Slot> slot_;
  const Make make_;
  std::unique_ptr<HttpAnswer> answer_;
};

}  // namespace

HttpOutcome WithText(const ServingContext& context, ResolvedModel model,
                     const std::function<void()>& wake,
                     std::function<HttpOutcome(const ModelText& text)> make) {
  if (model.terms.empty()) return make(context.text);
  const std::vector<WeightedAdapter> terms = model.terms;
  Waiting::Make with_lease = [&context, model = std::move(model),
                              make = std::move(make)](absl::StatusOr<AdapterLease> lease) -> HttpOutcome {
    LK_RETURN_IF_ERROR(lease.status());
    LK_RETURN_IF_ERROR(CheckVersion(model, lease->version()));
    return make(TextOf(context.text, lease->get()));
  };
  auto slot = std::make_shared<Slot>();
  context.mixer->AcquireAsync(terms, [slot, wake](absl::StatusOr<AdapterLease> lease) {
    {
      std::lock_guard lock(slot->mutex);
      slot->lease = std::move(lease);
    }
    wake();
  });
  return std::make_unique<Waiting>(std::move(slot), std::move(with_lease));
}

}  // namespace lorikeet
