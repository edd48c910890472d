// What the scheduler does with the images of adapters, each on the smallest history that shows it.
#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "tests/unit/scheduling.h"

namespace lorikeet {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using testing::MakeAdapter;
using testing::MakeRequest;
using testing::Scheduling;

TEST_F(Scheduling, ImagesAreFetchedInTurnAndThoseInUseStay) {
  Start({.max_batch_tokens = 64}, 14);
  const AdapterLease a = MakeAdapter("a"), b = MakeAdapter("b"), c = MakeAdapter("c");
  const auto loaded = [&](const AdapterLease& lease) {
    RequestEvents events;
    scheduler_->Loaded({lease.get()->serial, absl::OkStatus()}, now_, &events);
  };
  scheduler_->Enqueue(1, MakeRequest(3, 2, a), {5, 0});
  scheduler_->Enqueue(2, MakeRequest(3, 4, b), {4, 0});
  scheduler_->Enqueue(3, MakeRequest(3, 1, c), {3, 0});  // fits only without one of the others
  scheduler_->Enqueue(4, MakeRequest(3, 1, a), {5, 0});  // a is there, but it is c's turn
  EXPECT_FALSE(Plan()) << "no image is there";
  AdapterMoves moves = scheduler_->TakeMoves();
  ASSERT_EQ(moves.loads.size(), 2u);
  EXPECT_EQ(moves.loads[0].adapter.get(), a.get());
  EXPECT_EQ(moves.loads[0].pages.size(), 5u);
  EXPECT_EQ(moves.loads[1].adapter.get(), b.get());
  EXPECT_FALSE(Plan());
  EXPECT_TRUE(scheduler_->TakeMoves().empty()) << "they are on their way";
  loaded(b);
  Step();
  EXPECT_EQ(batch_.segments.size(), 1u) << "b runs though a's turn comes first";
  loaded(a);
  Step();
  EXPECT_EQ(batch_.segments.size(), 2u);
  EXPECT_EQ(scheduler_->waiting(), 2);
  Step();
  EXPECT_EQ(Finish(1), FinishReason::kLength);
  EXPECT_TRUE(scheduler_->TakeMoves().empty()) << "nothing in use was pushed out";
  Step();
  moves = scheduler_->TakeMoves();
  EXPECT_THAT(moves.drops, ElementsAre(a.get()->serial));
  ASSERT_EQ(moves.loads.size(), 1u);
  EXPECT_EQ(moves.loads[0].adapter.get(), c.get());
  EXPECT_EQ(Finish(2), FinishReason::kLength);
  loaded(c);
  Step();
  EXPECT_EQ(Finish(3), FinishReason::kLength);
}

TEST_F(Scheduling, BeyondItsTenantsBoundARequestWaitsAndOthersPass) {
  Start({.max_batch_tokens = 64}, 60, /*tenant_image_pages=*/8);
  const AdapterLease x1 = MakeAdapter("x1", "x"), x2 = MakeAdapter("x2", "x"), x3 = MakeAdapter("x3", "x");
  const AdapterLease y1 = MakeAdapter("y1", "y"), nobodys = MakeAdapter("nobody's");
  std::vector<uint64_t> drops;
  const auto plan = [&] {  // what it fetched, which is there at once
    std::vector<uint64_t> fetched;
    Plan();
    AdapterMoves moves = scheduler_->TakeMoves();
    if (batch_.rows() > 0) Commit();
    drops.insert(drops.end(), moves.drops.begin(), moves.drops.end());
    for (const AdapterLoad& load : moves.loads) {
      fetched.push_back(load.adapter.get()->serial);
      RequestEvents events;
      scheduler_->Loaded({fetched.back(), absl::OkStatus()}, now_, &events);
    }
    return fetched;
  };
  scheduler_->Enqueue(1, MakeRequest(3, 6, x1), {5, 0});
  scheduler_->Enqueue(2, MakeRequest(3, 4, x2), {4, 0});
  scheduler_->Enqueue(3, MakeRequest(3, 1, x3), {3, 0});  // would fit beside x1, but comes after x2
  scheduler_->Enqueue(4, MakeRequest(3, 1, x1), {5, 0});  // is there, but comes after x2 as well
  scheduler_->Enqueue(5, MakeRequest(3, 20, y1), {8, 0});
  scheduler_->Enqueue(6, MakeRequest(3, 20, nobodys), {9, 0});
  EXPECT_THAT(plan(), ElementsAre(x1.get()->serial, y1.get()->serial, nobodys.get()->serial));
  for (int step = 0; step < 6; ++step) {
    EXPECT_THAT(plan(), IsEmpty());
    EXPECT_EQ(Tokens(5).size(), step + 1) << "others go on";
    EXPECT_EQ(scheduler_->waiting(), 3);
  }
  EXPECT_EQ(Finish(1), FinishReason::kLength);
  EXPECT_THAT(plan(), ElementsAre(x2.get()->serial, x3.get()->serial)) << "x1 is idle and makes room";
  EXPECT_THAT(drops, ElementsAre(x1.get()->serial));
  for (int step = 0; step < 6; ++step) plan();
  for (const RequestId id : {2, 3, 4}) EXPECT_EQ(Finish(id), FinishReason::kLength) << id;
  EXPECT_EQ(drops.size(), 3u) << "x3 and x2 for x1";
  EXPECT_EQ(scheduler_->running(), 2);
}

TEST_F(Scheduling, WhatATenantsImagesHaveInCommonCountsOnceForIt) {
  Start({.max_batch_tokens = 64}, 60, /*tenant_image_pages=*/10);
  const auto shared = std::make_shared<const Adapter>();
  std::vector<AdapterLease> leases;
  for (const char* tenant : {"x", "x", "x", "y"}) {
    auto adapter = std::make_shared<Adapter>();
    adapter->shared = shared;
    leases.emplace_back(adapter, adapter, tenant);
    scheduler_->Enqueue(leases.size(), MakeRequest(3, 2, leases.back()), {3, 0}, {4, 0});
  }
  EXPECT_FALSE(Plan());
  std::vector<const Adapter*> loads;
  for (const AdapterLoad& load : scheduler_->TakeMoves().loads) loads.push_back(load.adapter.get());
  EXPECT_THAT(loads, ElementsAre(shared.get(), leases[0].get(), leases[1].get(), leases[3].get()))
      << "3 + 3 + 4 are its bound";
}

// b is colder than c, but while a runs beside it nothing would be free without it.
TEST_F(Scheduling, ImagesShareAPageThatGoesWhenAllOfThemCan) {
  Start({.max_batch_tokens = 100}, 6);
  const AdapterLease a = MakeAdapter("a"), b = MakeAdapter("b"), c = MakeAdapter("c"), d = MakeAdapter("d");
  const auto loaded = [&](const AdapterLease& lease) {
    RequestEvents events;
    scheduler_->Loaded({lease.get()->serial, absl::OkStatus()}, now_, &events);
  };
  scheduler_->Enqueue(1, MakeRequest(3, 6, a), {0, 8});
  scheduler_->Enqueue(2, MakeRequest(3, 1, b), {0, 8});
  EXPECT_FALSE(Plan());
  AdapterMoves moves = scheduler_->TakeMoves();
  ASSERT_EQ(moves.loads.size(), 2u);
  EXPECT_EQ(moves.loads[0].pages, moves.loads[1].pages);
  EXPECT_EQ(moves.loads[0].first_slot + moves.loads[1].first_slot, 8);
  loaded(a), loaded(b);
  Step();
  EXPECT_EQ(scheduler_->stats().pages_images_used, 1);
  scheduler_->Enqueue(3, MakeRequest(3, 1, c), {1, 0});
  Step();
  loaded(c);
  Step();
  EXPECT_EQ(Finish(3), FinishReason::kLength);
  EXPECT_EQ(scheduler_->pages_images(), 2);
  scheduler_->TakeMoves();
  scheduler_->Enqueue(4, MakeRequest(3, 1, d), {2, 0});
  Step();
  EXPECT_THAT(scheduler_->TakeMoves().drops, ElementsAre(c.get()->serial));
  loaded(d);
  while (!scheduler_->empty()) Step();
  scheduler_->Enqueue(5, MakeRequest(90, 1));  // the whole pool
  Step();
  EXPECT_EQ(scheduler_->TakeMoves().drops.size(), 3u);
  EXPECT_EQ(scheduler_->pages_images(), 0);
}

TEST_F(Scheduling, AFailedLoadEndsItsOwnRequestsAndGivesThePagesBack) {
  Start({.max_batch_tokens = 64}, 14);
  const AdapterLease a = MakeAdapter("a");
  scheduler_->Enqueue(1, MakeRequest(3, 2, a), {5, 0});
  scheduler_->Enqueue(2, MakeRequest(3, 1));
  Step();
  EXPECT_EQ(Finish(2), FinishReason::kLength);
  EXPECT_EQ(scheduler_->pages_images(), 5);
  RequestEvents events;
  scheduler_->Loaded({a.get()->serial, absl::ResourceExhaustedError("no memory")}, now_, &events);
  Take(std::move(events));
  EXPECT_EQ(Finish(1), FinishReason::kError);
  EXPECT_EQ(scheduler_->pages_images(), 0);
  EXPECT_TRUE(scheduler_->empty());
}

// Two adapters of three pages each with four in common.
TEST_F(Scheduling, WhatAStepReadsHasWhatItsAdaptersShareOnce) {
  Start({.max_batch_tokens = 64}, 20);
  const auto shared = std::make_shared<const Adapter>();
  std::vector<AdapterLease> leases;
  for (RequestId id = 1; id <= 2; ++id) {
    auto adapter = std::make_shared<Adapter>();
    adapter->shared = shared;
    leases.emplace_back(std::move(adapter));
    scheduler_->Enqueue(id, MakeRequest(3, 2, leases.back()), {3, 0}, {4, 0});
  }
  EXPECT_FALSE(Plan());
  for (const auto& load : scheduler_->TakeMoves().loads) {
    RequestEvents events;
    scheduler_->Loaded({load.adapter.get()->serial, absl::OkStatus()}, now_, &events);
  }
  for (int step = 0; step < 2; ++step) {
    Step();
    EXPECT_EQ(scheduler_->stats().pages_images_used, 3 + 3 + 4);
    const int64_t pages = 3 + 3 + 4 + 1 + 1;  // and one of each sequence
    EXPECT_EQ(scheduler_->stats().context_bytes, pages * KvLayout::Make(2, 1, 64, DType::kF32).page_bytes());
  }
}

TEST_F(Scheduling, AnImageStaysForLaterRequestsAndGoesWithItsAdapter) {
  Start({.max_batch_tokens = 64}, 14);
  auto home = std::make_shared<const Adapter>();
  const uint64_t serial = home->serial;
  for (RequestId id = 1; id <= 2; ++id) {
    // Every request has a lease of its own, as the registry gives them.
    const AdapterLease lease(std::shared_ptr<const Adapter>(home.get(), [](const Adapter*) {}),
                             home);
    scheduler_->Enqueue(id, MakeRequest(3, 1, lease), {5, 0});
    if (id == 1) {
      EXPECT_FALSE(Plan());
      EXPECT_EQ(scheduler_->TakeMoves().loads.size(), 1u);
      RequestEvents events;
      scheduler_->Loaded({serial, absl::OkStatus()}, now_, &events);
    }
    Step();
    EXPECT_EQ(Finish(id), FinishReason::kLength);
    EXPECT_TRUE(scheduler_->TakeMoves().empty());
  }
  EXPECT_FALSE(Plan());
  EXPECT_TRUE(scheduler_->TakeMoves().empty()) << "it stays for later requests";
  home.reset();
  EXPECT_FALSE(Plan()) << "it goes though there is no request";
  EXPECT_THAT(scheduler_->TakeMoves().drops, ElementsAre(serial));
  EXPECT_EQ(scheduler_->pages_images(), 0);
}

}  // namespace
}  // namespace lorikeet
