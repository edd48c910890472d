// A runner whose "model" is a hash of the whole history. It keeps what each row writes in the
// pages the batch names and reads the history back from there, so a wrong page, position, chunk or
// writer changes the tokens or fails outright.
#pragma once

#include <cstdint>
#include <algorithm>
#include <functional>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/memory/kv_layout.h"
#include "engine/runner/runner.h"
#include "gtest/gtest.h"

namespace lorikeet {

inline uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9E3779B97F4A7C15u + b + 0x632BE59BD9B4E019u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// What the fake model answers after `history`, alone: the reference for every mix.
struct FakeModel {
  int32_t vocab = 64;

  uint64_t State(std::span<const int32_t> history, const Adapter* adapter) const {
    uint64_t state = adapter ? Mix(std::hash<std::string>()(adapter->version), 1) : 0;
    for (const int32_t token : history) state = Mix(state, token);
    return state;
  }
  int32_t Token(uint64_t state, uint64_t seed) const {
    return static_cast<int32_t>(Mix(state, seed) % vocab);
  }
  float Logprob(uint64_t state, int32_t target) const {
    return -static_cast<float>(Mix(state, target) % 1000) / 100.0f;
  }
};

// Images that are there `steps_to_load` calls of TakeLoaded after they were asked for. Every slot of a page
// knows the image that lies in it, so that two users of it are seen.
class FakeImages final : public AdapterImages {
 public:
  explicit FakeImages(int32_t pages, int64_t page_bytes = 1)
      : page_bytes_(page_bytes), owner_(pages * ImageSize::kSlots, 0) {}

  ImageSize SizeOf(const Adapter& adapter) const {
    const int64_t slots = (adapter.bytes * ImageSize::kSlots + page_bytes_ - 1) / page_bytes_;
    return {static_cast<int32_t>(slots / ImageSize::kSlots), static_cast<int32_t>(slots % ImageSize::kSlots)};
  }

  // Of what it has in common with others.
  ImageSize SharedSizeOf(const Adapter& adapter) const {
    return adapter.shared != nullptr ? SizeOf(*adapter.shared) : ImageSize();
  }

  absl::StatusOr<ImageSize> Size(const Adapter& adapter) const override { return SizeOf(adapter); }
  void SetWake(std::function<void()> wake) override {
    std::lock_guard lock(mutex_);
    wake_ = std::move(wake);
  }
  void Move(AdapterMoves moves) override {
    for (const uint64_t serial : moves.drops) {
      EXPECT_EQ(there_.erase(serial), 1u) << "dropped what was not there";
      Forget(serial);
    }
    for (AdapterLoad& load : moves.loads) {
      const Adapter& adapter = *load.adapter.get();
      EXPECT_EQ(load.size, SizeOf(adapter));
      Place(load);
      ++loads;
      loads_shared += adapter.shared != nullptr && there_.contains(adapter.shared->serial);
      coming_.push_back({adapter.serial, adapter.shared != nullptr ? adapter.shared->serial : 0, steps_to_load()});
    }
    Wake();
  }
  std::vector<AdapterLoaded> TakeLoaded() override {
    std::vector<AdapterLoaded> loaded;
    for (Coming& coming : coming_) {
      if (coming.steps-- > 0) continue;
      const bool failed = fail || !Known(coming.shared);
      loaded.push_back({coming.serial,
                        failed ? absl::ResourceExhaustedError("no memory") : absl::OkStatus(), 1});
      if (!failed) there_.insert(coming.serial);
      if (failed) Forget(coming.serial);
    }
    std::erase_if(coming_, [](const Coming& c) { return c.steps < 0; });
    if (!coming_.empty()) Wake();
    return loaded;
  }

  void Check(const Batch& batch) const {
    for (const AdapterSegment& segment : batch.segments) {
      if (SizeOf(*segment.adapter).empty()) continue;
      EXPECT_TRUE(there_.contains(segment.adapter->serial)) << "a step before its adapter";
      const Adapter* shared = segment.adapter->shared.get();
      EXPECT_TRUE(shared == nullptr || there_.contains(shared->serial)) << "a step before what it shares";
    }
    for (const auto* pages : {&batch.pages, &batch.base_pages}) {
      for (const int32_t page : *pages) {
        EXPECT_TRUE(IsEmpty(page)) << "page " << page << " has an image and keys and values";
      }
    }
  }

  // Pages where images lie.
  int32_t pages_held() const {
    int32_t pages = 0;
    for (int32_t page = 0; page < std::ssize(owner_) / ImageSize::kSlots; ++page) pages += !IsEmpty(page);
    return pages;
  }

  // Pages that images were written to since the last call.
  std::vector<int32_t> TakeWritten() { return std::exchange(written_, {}); }

  std::function<int32_t()> steps_to_load = [] { return 0; };
  bool fail = false;
  int64_t loads = 0;
  int64_t loads_shared = 0;  // of them, those that found there what they have in common with others

 private:
  struct Coming {
    uint64_t serial;
    uint64_t shared;  // Adapter::shared's; 0: none
    int32_t steps;
  };
  void Place(const AdapterLoad& load) {
    const uint64_t serial = load.adapter.get()->serial;
    EXPECT_EQ(std::ssize(load.pages), load.size.most_pages());
    for (int32_t p = 0; p < std::ssize(load.pages); ++p) {
      const bool whole = p < load.size.pages;
      const int32_t begin = whole ? 0 : load.first_slot, end = whole ? ImageSize::kSlots : begin + load.size.slots;
      EXPECT_LE(end, ImageSize::kSlots);
      for (int32_t slot = begin; slot < end; ++slot) {
        uint64_t& owner = owner_[load.pages[p] * ImageSize::kSlots + slot];
        EXPECT_EQ(owner, 0u) << "slot " << slot << " of page " << load.pages[p] << " has two images";
        owner = serial;
      }
      written_.push_back(load.pages[p]);
    }
  }
  bool IsEmpty(int32_t page) const {
    const auto begin = owner_.begin() + page * ImageSize::kSlots;
    return std::all_of(begin, begin + ImageSize::kSlots, [](uint64_t owner) { return owner == 0; });
  }
  // There or on its way.
  bool Known(uint64_t serial) const {
    return serial == 0 || there_.contains(serial) || std::ranges::any_of(coming_, [serial](const Coming& c) {
             return c.serial == serial && c.steps >= 0;
           });
  }
  void Forget(uint64_t serial) {
    for (uint64_t& owner : owner_) owner = owner == serial ? 0 : owner;
  }
  void Wake() {
    std::lock_guard lock(mutex_);
    if (wake_) wake_();
  }

  const int64_t page_bytes_;
  std::mutex mutex_;
  std::function<void()> wake_;
  std::vector<uint64_t> owner_;  // [pages, slots] serial of the image that lies there; 0: none
  std::vector<int32_t> written_;
  std::vector<Coming> coming_;
  std::set<uint64_t> there_;
};

class FakeRunner final : public Runner {
 public:
  // `images` may be nullptr.
  FakeRunner(FakeModel model, KvLayout kv, int32_t pages, FakeImages* images = nullptr)
      : images_(images), model_(model), kv_(kv), slots_(size_t(pages) * KvLayout::kPageTokens) {}

  absl::StatusOr<StepResult> Run(const Batch& batch) override {
    if (images_ != nullptr) {
      images_->Check(batch);
      for (const int32_t page : images_->TakeWritten()) {
        std::fill_n(slots_.begin() + size_t(page) * KvLayout::kPageTokens, KvLayout::kPageTokens,
                    Slot());
      }
    }
    Store(batch);
    StepResult result;
    for (const LogitRow& row : batch.logit_rows) result.sampled.push_back(Answer(batch, row));
    if (on_run) {
      absl::Status status = on_run(batch, &result);
      if (!status.ok()) return status;
    }
    return result;
  }

  AdapterImages* images() override { return images_; }

  // Called at the end of each step; may change the result or fail the device.
  std::function<absl::Status(const Batch&, StepResult*)> on_run;

 private:
  // What a token's keys and values depend on besides the tokens before it.
  struct Slot {
    int32_t token = -1;  // -1: nothing yet
    std::string version;
    bool operator==(const Slot&) const = default;
  };

  static const Adapter* AdapterOf(const Batch& batch, int32_t row) {
    for (const AdapterSegment& segment : batch.segments) {
      if (row >= segment.row_begin && row < segment.row_end) return segment.adapter;
    }
    return nullptr;
  }

  // One of the two lists of pages of a batch.
  struct Pages {
    std::span<const int32_t> begin;
    std::span<const int32_t> ids;
  };
  static Pages Own(const Batch& batch) { return {batch.page_begin, batch.pages}; }
  static Pages OfBase(const Batch& batch) { return {batch.base_page_begin, batch.base_pages}; }

  Slot& SlotOf(const Pages& pages, int32_t sequence, int32_t position, int32_t page_of_block) {
    const int32_t block = position / KvLayout::kPageTokens;
    const int32_t index = pages.begin[sequence] + block * kv_.pages_per_block + page_of_block;
    EXPECT_LT(index, pages.begin[sequence + 1]) << "no page for position " << position;
    return slots_[size_t(pages.ids[index]) * KvLayout::kPageTokens +
                  position % KvLayout::kPageTokens];
  }

  void Store(const Batch& batch) {
    for (int32_t s = 0; s < batch.sequences(); ++s) {
      for (int32_t r = batch.sequence_begin[s]; r < batch.sequence_begin[s + 1]; ++r) {
        const Adapter* adapter = AdapterOf(batch, r);
        for (int32_t p = 0; p < kv_.pages_per_block; ++p) {
          SlotOf(Own(batch), s, batch.positions[r], p) = {batch.tokens[r],
                                                          adapter ? adapter->version : ""};
          if (!adapter || adapter->kv_sets() == 1) continue;
          SlotOf(OfBase(batch), s, batch.positions[r], p) = {batch.tokens[r], ""};
        }
      }
    }
  }

  SampledToken Answer(const Batch& batch, const LogitRow& row) {
    const Adapter* adapter = AdapterOf(batch, row.row);
    const int32_t position = batch.positions[row.row];
    EXPECT_EQ(row.history.size(), position + 1);
    std::vector<int32_t> history(position + 1);
    for (int32_t i = 0; i <= position; ++i) {
      const Slot& slot = SlotOf(Own(batch), row.sequence, i, 0);
      history[i] = slot.token;
      if (adapter && adapter->kv_sets() == 2) {
        EXPECT_TRUE(SlotOf(OfBase(batch), row.sequence, i, 0) == (Slot{slot.token, ""}))
            << "the base's page holds something else at position " << i;
      }
      EXPECT_EQ(slot.token, row.history[i]) << "pages hold another token at position " << i;
      EXPECT_EQ(slot.version, adapter ? adapter->version : "") << "written by another adapter";
      for (int32_t p = 1; p < kv_.pages_per_block; ++p) {
        EXPECT_TRUE(SlotOf(Own(batch), row.sequence, i, p) == slot) << "page " << p << " of a block";
      }
    }
    const uint64_t state = model_.State(history, adapter);
    SampledToken sampled;
    sampled.token = row.target >= 0 ? row.target : model_.Token(state, row.sampling->seed);
    sampled.logprobs.logprob = model_.Logprob(state, sampled.token);
    return sampled;
  }

  FakeImages* const images_;
  const FakeModel model_;
  const KvLayout kv_;
  std::vector<Slot> slots_;  // [pages, kPageTokens]
};

}  // namespace lorikeet
