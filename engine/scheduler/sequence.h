// A request being served. The scheduler's own: no other folder includes this.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "engine/api/request.h"
#include "engine/api/token_event.h"
#include "engine/memory/sequence_pages.h"
#include "engine/scheduler/scheduler.h"

namespace lorikeet {

enum class SequenceState : uint8_t { kWaiting, kPreempted, kRunning, kFinished };

struct Scheduler::Sequence {
  Sequence(RequestId id, Request request, Group* group, PrefixCache* cache, const KvLayout* layout)
      : id(id),
        request(std::move(request)),
        virtual_tokens(VirtualTokensOf(this->request)),
        adapter_from(AdapterFrom(this->request)),
        tokens(TokensOf(std::move(this->request.prompt), virtual_tokens)),
        prompt_tokens(static_cast<int32_t>(tokens.size())),
        group(group),
        pages(cache, layout, KvSetsOf(this->request)) {}

  static int32_t VirtualTokensOf(const Request& request) {
    return request.adapter.get() ? request.adapter.get()->virtual_tokens.count : 0;
  }
  static int32_t KvSetsOf(const Request& request) {
    return request.adapter.get() ? request.adapter.get()->kv_sets() : 1;
  }
  static int32_t AdapterFrom(const Request& request);
  static std::vector<int32_t> TokensOf(std::vector<int32_t> prompt, int32_t virtual_tokens);

  int32_t length() const { return static_cast<int32_t>(tokens.size()); }
  int32_t generated() const { return length() - prompt_tokens; }
  int32_t uncomputed() const { return length() - computed; }
  // What the row of a token not computed yet is for besides its keys and values.
  RowUse UseOf(int32_t position) const;
  // Rows of the prompt whose results come before the last.
  bool wants_prompt_rows() const {
    return request.sampling.prompt_logprobs ||
           (request.embedding && request.embedding->pooling() == Pooling::kMean);
  }

  // One row is all it lacks: its turn comes before prompts'.
  bool decoding() const { return uncomputed() == 1; }

  const RequestId id;
  Request request;              // its prompt has moved to `tokens`
  const int32_t virtual_tokens;  // of the adapter, before the prompt: ids -1, -2, ...
  const int32_t adapter_from;    // the first position that is the adapter's
  std::vector<int32_t> tokens;   // virtual tokens, prompt, then output
  const int32_t prompt_tokens;   // virtual ones included
  Group* const group;
  SequencePages pages;
  KvIdentity kv_identity;  // of all its positions; nullptr: it neither uses nor fills the cache
  SequenceState state = SequenceState::kWaiting;
  int64_t admission = -1;                      // counted at the first admission: smaller is older
  int64_t admitted_us = 0;                     // of the first admission
  bool image_was_there = true;                 // when it came
  int32_t computed = 0;                        // tokens whose K and V are in `pages`
  int32_t cached_tokens = 0;                   // of the prompt, found at the first admission
  int32_t planned = 0;                         // rows of the step in flight
  std::vector<int32_t> forbidden;              // at the row planned
  std::vector<TokenLogprobs> prompt_logprobs;  // of tokens 1, 2, ... so far
  int32_t prompt_rows_done = 0;                // whose results are there, sent ones included
};

enum class ImageState : uint8_t { kAbsent, kLoading, kReady };

struct Scheduler::Group {
  // Whether steps can use the adapter.
  bool there() const {
    return image == ImageState::kReady && (shared == nullptr || shared->image == ImageState::kReady);
  }
  int32_t all_pages() const { return size.most_pages() + (shared != nullptr ? shared->size.most_pages() : 0); }
  bool unloaded() const { return adapter != nullptr && home.expired(); }
  // Its image could go: it is there, and neither a sequence that runs uses it nor an image that could not go.
  bool idle() const { return image == ImageState::kReady && has_image() && running == 0; }
  // Its image is there or on its way, and could not go.
  bool busy() const { return has_image() && !idle(); }
  bool has_image() const { return image != ImageState::kAbsent && !size.empty(); }  // there or on its way

  const Adapter* adapter = nullptr;   // valid while `open`
  uint64_t serial = 0;                // 0: the base
  std::weak_ptr<const Adapter> home;  // AdapterLease::home
  ImageState image = ImageState::kReady;  // stays so where none is needed
  ImageSize size;              // of the image; empty where none is needed
  Tenant* tenant = nullptr;    // whose bound its image counts towards; nullptr: nobody's
  std::map<const Tenant*, int32_t> tenants;  // whose images, there or on their way, need this one's
  Group* shared = nullptr;     // whose image this one's needs as well; nullptr: it needs no other
  bool counted = false;        // by CountStep, while it is at work
  int32_t users = 0;           // groups whose images, there or on their way, need this one's
  std::vector<int32_t> pages;         // of the image's own, while it is there or on its way
  PageShares::Run rest;               // of the image in a page that others share; as long
  int64_t last_use = 0;               // of the image, in PrefixCache::now()
  int64_t order = 0;              // of rows in a batch: the base first, then by first use
  int32_t open = 0;               // sequences in any state, those of groups that share this one's
  int32_t running = 0;            // sequences in `running_`, and groups that share this one's and are busy
  std::deque<Sequence*> waiting;  // first come first; never admitted yet
};

}  // namespace lorikeet
