// Blocks that many adapters have in common (VeRA's projections, TinyLoRA's frozen factors), in memory
// once for all of them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/base/aligned_buffer.h"

namespace lorikeet {

// Thread-safe. Blocks may outlive it.
class SharedBlobs {
 public:
  // A block with the content of `block`: the one that is in use, else `block` itself.
  std::shared_ptr<const AlignedBuffer> Share(std::shared_ptr<const AlignedBuffer> block);

  // An adapter that holds the rows and nothing else (Adapter::shared): the one in use, else a new one. Each
  // row's data is that of one of the blocks.
  std::shared_ptr<const Adapter> Together(std::vector<SharedRows> rows,
                                          const std::vector<std::shared_ptr<const AlignedBuffer>>& blocks);

  int64_t bytes() const;  // of the blocks in use

 private:
  struct State {
    std::mutex mutex;
    std::map<std::string, std::weak_ptr<const AlignedBuffer>> blocks;  // by SHA-256 of the content
    std::vector<std::weak_ptr<const Adapter>> together;
    int64_t bytes = 0;
  };
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace lorikeet
