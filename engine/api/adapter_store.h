// The engine's and the front's view of the adapter cache.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/api/adapter.h"

namespace lorikeet {

// Pins one adapter version: while a lease lives, its adapter stays in memory, whatever happens to
// its name. An empty lease means the base model. Copyable; dropping the last copy unpins.
class AdapterLease {
 public:
  AdapterLease() = default;
  explicit AdapterLease(std::shared_ptr<const Adapter> adapter)
      : adapter_(std::move(adapter)), home_(adapter_) {}
  // `adapter` ends with the lease, `home` with the copy in host memory that it stands for.
  AdapterLease(std::shared_ptr<const Adapter> adapter, std::weak_ptr<const Adapter> home,
               std::string tenant = {})
      : adapter_(std::move(adapter)), home_(std::move(home)), tenant_(std::move(tenant)) {}

  const Adapter* get() const { return adapter_.get(); }  // nullptr: base model
  const std::shared_ptr<const Adapter>& share() const { return adapter_; }
  // Expired once the adapter has left host memory: no lease of this very copy can follow.
  const std::weak_ptr<const Adapter>& home() const { return home_; }
  // Whose share of the device its image takes; empty: nobody's.
  const std::string& tenant() const { return tenant_; }
  std::string_view version() const {
    return adapter_ ? std::string_view(adapter_->version) : std::string_view();
  }

 private:
  std::shared_ptr<const Adapter> adapter_;
  std::weak_ptr<const Adapter> home_;
  std::string tenant_;
};

// Thread-safe.
class AdapterStore {
 public:
  virtual ~AdapterStore() = default;

  // The version that `name` leads to now, or the first of several. NOT_FOUND names the adapter.
  virtual absl::StatusOr<std::string> Find(std::string_view name) const = 0;

  // Whether an unknown `name` may be found elsewhere: AcquireAsync then looks for it.
  virtual bool MayAppear(std::string_view name) const {
    static_cast<void>(name);
    return false;
  }

  // Pins a version of `name` and hands it to `done`: at once, on this thread, if it is in host
  // memory or cannot be had, else on another thread when it has been read. NOT_FOUND names the
  // adapter; it is never answered by the base model.
  virtual void AcquireAsync(std::string_view name,
                            std::function<void(absl::StatusOr<AdapterLease>)> done) = 0;
};

}  // namespace lorikeet
