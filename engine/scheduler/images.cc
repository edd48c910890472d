// The scheduler's half of adapters on the device: which images are in the pool, whose pages go when
// room is needed, what is to be copied next.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/base/check.h"
#include "engine/scheduler/scheduler.h"
#include "engine/scheduler/sequence.h"

namespace lorikeet {
namespace {

// Groups with waiting requests whose images are fetched ahead of their turn, and images on their
// way at a time: enough to keep the copy busy for a step, few enough that what comes is soon used.
constexpr size_t kLookAhead = 16;
constexpr int32_t kMaxLoading = 8;

// A page of keys and values takes that many times as long to compute again as a page of an image
// takes to be copied again: on an H100 with an 8B model 0.23 against 0.018 ms a MB.
constexpr int64_t kBlockCost = 12;

}  // namespace

bool Scheduler::ColderFirst::operator()(const Group* a, const Group* b) const {
  const auto rank = [](const Group& g) { return std::tuple(g.open > 0, g.last_use, g.users > 0, g.serial); };
  return rank(*a) < rank(*b);
}

// Changes what idle_ and its pages go by: what an image is, who runs or waits with it, its last use.
template <typename Fn>
void Scheduler::Change(Group* group, const Fn& change) {
  const bool was_busy = group->busy();
  if (group->idle()) NoteIdle(group, false);
  change();
  if (group->idle()) NoteIdle(group, true);
  if (group->shared != nullptr) NoteUse(group->shared, group->busy() - was_busy, group->last_use);
}

void Scheduler::NoteIdle(Group* group, bool idle) {
  const bool wanted = group->open > 0;
  if (idle) idle_.insert(group);
  else idle_.erase(group);
  idle_pages_[wanted] += idle ? group->size.pages : -group->size.pages;
  if (group->size.slots > 0) shares_.SetIdle(group->rest, wanted, idle);
}

// `busy`: so many more of the images that need this one's may not go.
void Scheduler::NoteUse(Group* shared, int32_t busy, int64_t last_use) {
  if (busy == 0 && last_use <= shared->last_use) return;
  Change(shared, [=] {
    shared->running += busy;
    shared->last_use = std::max(shared->last_use, last_use);
  });
}

void Scheduler::EnterRunning(Sequence* sequence) {
  running_.push_back(sequence);
  Change(sequence->group, [&] { ++sequence->group->running; });
}

void Scheduler::LeaveRunning(Sequence* sequence) {
  std::erase(running_, sequence);
  Group* group = sequence->group;
  Change(group, [&] {
    --group->running;
    group->last_use = cache_.now();
  });
}

void Scheduler::Open(Group* group) {
  Change(group, [group] { ++group->open; });
  if (group->shared != nullptr) Open(group->shared);
}

void Scheduler::Close(Group* group) {
  Change(group, [group] { --group->open; });
  if (group->shared != nullptr) Change(group->shared, [shared = group->shared] { --shared->open; });
  ForgetIdle(group);
}

// Groups live while they have requests, an image, or others' images that need theirs.
void Scheduler::ForgetIdle(Group* group) {
  if (group == nullptr || group->open > 0 || group->has_image() || group->users > 0) return;
  Group* shared = group->shared;
  groups_.erase(group->serial);
  ForgetIdle(shared);
}

// While room is made, what an image needs counts as in use: by = 1, and -1 thereafter.
void Scheduler::Keep(Group* group, int32_t by) {
  for (; group != nullptr; group = group->shared) Change(group, [=] { group->running += by; });
}

// Pages that are free or can be: prefixes nobody uses and idle images. `wanted`: those that requests wait for as well.
int64_t Scheduler::Available(bool wanted) const {
  return cache_.available() + idle_pages_[0] + (wanted ? idle_pages_[1] : 0) + shares_.CanGo(wanted);
}

// Of these images the one to go first. Not one that would leave its page to others that stay.
Scheduler::Group* Scheduler::Coldest(bool wanted) const {
  for (Group* group : idle_) {
    if (group->open > 0 && !wanted) return nullptr;
    const bool gives = group->size.pages > 0 || group->shared != nullptr;  // which can go only then
    if (gives || shares_.CanGo(group->rest.page, wanted)) return group;
  }
  return nullptr;
}

// Frees `count` pages, of images and of prefixes, what is cheapest to bring back for its age first.
// False, and nothing changed, if there are not so many.
bool Scheduler::MakeRoom(int64_t count, bool wanted) {
  if (count <= pool_.free()) return true;
  if (count > Available(wanted)) return false;
  while (pool_.free() < count) {
    Group* group = Coldest(wanted);
    const PrefixCache::Block* block = cache_.coldest();
    const bool image = group != nullptr &&
                       (block == nullptr || group->unloaded() ||
                        kBlockCost * (cache_.now() - group->last_use) >= cache_.now() - block->last_use);
    if (image) DropImage(group);
    else cache_.EvictColdest();
  }
  return true;
}

// Of a group whose image comes (1) or goes (-1).
void Scheduler::CountTenant(Group* group, int sign) {
  Tenant* tenant = group->tenant;
  if (tenant == nullptr) return;
  tenant->slots += sign * group->size.all_slots();
  if (group->shared == nullptr) return;
  int32_t& images = group->shared->tenants[tenant];
  if (images == 0 || images + sign == 0) tenant->slots += sign * group->shared->size.all_slots();
  images += sign;
}

// Whether its image keeps to its tenant's bound, after that tenant's idle ones made room. `wanted` as above.
bool Scheduler::MakeTenantRoom(const Group& group, bool wanted) {
  const Tenant* tenant = group.tenant;
  const int64_t bound = int64_t{options_.tenant_image_pages} * ImageSize::kSlots;
  while (true) {
    const bool has_shared = group.shared == nullptr || group.shared->tenants[tenant] > 0;
    const int64_t slots = group.size.all_slots() + (has_shared ? 0 : group.shared->size.all_slots());
    if (tenant->slots + slots <= bound) return true;
    const auto coldest = std::ranges::find(idle_, tenant, &Group::tenant);
    if (coldest == idle_.end() || (!wanted && (*coldest)->open > 0)) return false;
    DropImage(*coldest);
  }
}

// Whether the group or one before it in line waits until an image of their tenant's goes.
bool Scheduler::MustWaitForTenant(Group* group) {
  Tenant* tenant = group->tenant;
  if (tenant == nullptr) return false;
  if (tenant->no_room != nullptr) return true;
  const bool first = std::exchange(tenant->looked_at, cache_.now()) != cache_.now() && preempted_.empty();
  if (group->image != ImageState::kAbsent || loading_ >= kMaxLoading) return false;
  if (MakeTenantRoom(*group, first)) return false;
  tenant->no_room = group;
  full_.push_back(tenant);
  return true;
}

void Scheduler::FreeImage(Group* group) {
  CountTenant(group, -1);
  Change(group, [group] { group->image = ImageState::kAbsent; });
  pool_.Free(group->pages);
  group->pages.clear();
  if (group->size.slots > 0) shares_.Free(group->rest);
  pages_images_ -= group->size.pages;
  if (group->shared != nullptr) Change(group->shared, [shared = group->shared] { --shared->users; });
}

void Scheduler::DropImage(Group* group) {
  LK_CHECK(group->users == 0);
  FreeImage(group);
  moves_.drops.push_back(group->serial);
  ++stats_.images_dropped;
  ForgetIdle(group);
}

// Images of adapters that are gone from the host as well: nobody can ask for them again. What they had in
// common stands behind them.
void Scheduler::DropUnloaded() {
  std::vector<Group*> gone;
  for (Group* group : idle_) {
    if (group->open > 0) break;  // as in all behind
    if (group->unloaded()) gone.push_back(group);
  }
  for (Group* group : gone) DropImage(group);
}

void Scheduler::StartLoad(Group* group, AdapterLease adapter) {
  LK_CHECK(pool_.Alloc(group->size.pages, &group->pages));
  AdapterLoad load{std::move(adapter), group->size, group->pages};
  if (group->size.slots > 0) {
    group->rest = shares_.Take(group->size.slots);
    load.pages.push_back(group->rest.page);
    load.first_slot = group->rest.first;
  }
  if (group->shared != nullptr) Change(group->shared, [shared = group->shared] { ++shared->users; });
  Change(group, [group] { group->image = ImageState::kLoading; });
  CountTenant(group, 1);
  ++loading_;
  pages_images_ += group->size.pages;
  moves_.loads.push_back(std::move(load));
}

// Fetches images in the order of admission, where they leave room for the requests that wait for
// them. Only the first in line may push out images that others wait for.
void Scheduler::StartLoads() {
  int64_t tokens_room = RunningBlocks();
  no_room_ = nullptr;
  for (Tenant* tenant : full_) tenant->no_room = nullptr;
  full_.clear();
  const auto fetch = [&](const Sequence* sequence, bool first) {
    Group* group = sequence->group;
    tokens_room += sequence->pages.PagesFor(sequence->length());
    if (group->image != ImageState::kAbsent) return true;
    if (loading_ >= kMaxLoading) return false;
    Group* shared = group->shared;
    const bool with_shared = shared != nullptr && shared->image == ImageState::kAbsent;
    const int32_t pages = group->size.most_pages() + (with_shared ? shared->size.most_pages() : 0);
    Keep(shared, 1);
    const bool has_room = MakeRoom(pages + tokens_room, first);
    Keep(shared, -1);
    if (!has_room) {
      no_room_ = group;
      return false;
    }
    const AdapterLease& adapter = sequence->request.adapter;
    if (with_shared) StartLoad(shared, AdapterLease(adapter.get()->shared));
    StartLoad(group, adapter);
    return true;
  };
  if (!preempted_.empty() && !fetch(preempted_.front(), true)) return;
  size_t ahead = 0;
  for (auto turn = turns_.begin(); turn != turns_.end() && ahead < kLookAhead; ++turn) {
    if (MustWaitForTenant(*turn)) continue;
    if (!fetch((*turn)->waiting.front(), ahead == 0 && preempted_.empty())) return;
    ++ahead;
  }
}

void Scheduler::Loaded(const AdapterLoaded& loaded, int64_t now_us, RequestEvents* events) {
  LK_CHECK(!step_.planned);
  --loading_;
  Group* group = groups_.at(loaded.serial).get();
  Change(group, [&] {
    group->last_use = cache_.now();
    group->image = ImageState::kReady;
  });
  if (loaded.status.ok()) {
    LK_CHECK(group->shared == nullptr || group->shared->image != ImageState::kAbsent);
    return;
  }
  FreeImage(group);
  std::vector<Sequence*> failed;
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->group == group || sequence->group->shared == group) failed.push_back(sequence.get());
  }
  if (failed.empty()) ForgetIdle(group);
  for (Sequence* sequence : failed) {
    Finish(sequence, FinishReason::kError, loaded.status, now_us, events);
    Remove(sequence);
  }
}

AdapterMoves Scheduler::TakeMoves() { return std::exchange(moves_, {}); }

}  // namespace lorikeet
