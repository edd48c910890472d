#include "server/plan_capacity.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/api/limits.h"
#include "engine/base/status_macros.h"

namespace lorikeet {
namespace {

absl::Status CheckRange(const char* field, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, " is not in [", least, ", ", most, "]"));
}

absl::StatusOr<DType> ElementType(int32_t bytes_per_value) {
  if (bytes_per_value == 0 || bytes_per_value == 2) return DType::kBF16;
  if (bytes_per_value == 4) return DType::kF32;
  return absl::InvalidArgumentError(
      absl::StrCat("bytes_per_value: ", bytes_per_value, " is neither 2 nor 4"));
}

// An adapter of the shape, without weights: what is to be measured, not used.
absl::StatusOr<Adapter> ShapedLike(const v1::PlanCapacityRequest& request, const BaseModel& base) {
  LK_ASSIGN_OR_RETURN(const DType dtype, ElementType(request.bytes_per_value()));
  static constexpr std::byte kNoWeights{};
  Adapter adapter;
  adapter.modules.resize(ModuleCount(base.layers(), base.experts()));
  std::vector<std::string> unknown(request.linears().begin(), request.linears().end());
  for (const ModuleId id : base.modules()) {
    if (id == HeadModule(base.layers())) continue;
    const std::string path = base.path(id);
    const std::string linear = path.substr(path.rfind('.') + 1);
    std::erase(unknown, linear);
    if (!request.linears().empty() && std::ranges::count(request.linears(), linear) == 0) continue;
    const LinearShape shape = base.shape(id);
    adapter.modules[id].low_rank = {.rank = request.rank(),
                                    .dtype = dtype,
                                    .a = &kNoWeights,
                                    .b = &kNoWeights,
                                    .a_stride = shape.in,
                                    .b_stride = shape.out};
    adapter.bytes += ByteSize(dtype, int64_t{request.rank()} * (shape.in + shape.out));
  }
  if (unknown.empty()) return adapter;
  return absl::InvalidArgumentError(
      absl::StrCat("linears: the model has no '", unknown.front(), "'"));
}

// Images of one size that lie with others in a page: so many of them.
int64_t Together(ImageSize size) { return ImageSize::kSlots / size.slots; }

int64_t ImagesIn(int64_t pages, ImageSize size) {
  if (size.slots == 0) return pages / size.pages;
  return pages * Together(size) / (Together(size) * size.pages + 1);
}

int64_t PagesOf(int64_t images, ImageSize size) {
  if (size.slots == 0) return images * size.pages;
  return images * size.pages + (images + Together(size) - 1) / Together(size);
}

}  // namespace

absl::StatusOr<v1::PlanCapacityResponse> PlanCapacity(const v1::PlanCapacityRequest& request,
                                                      const Capacity& capacity) {
  constexpr int64_t kMost = int64_t{1} << 40;
  LK_RETURN_IF_ERROR(CheckRange("rank", request.rank(), 1, Limits::kMaxAdapterRank));
  LK_RETURN_IF_ERROR(CheckRange("adapters", request.adapters(), 0, kMost));
  LK_RETURN_IF_ERROR(CheckRange("kv_tokens", request.kv_tokens(), 0, kMost));
  LK_ASSIGN_OR_RETURN(const Adapter adapter, ShapedLike(request, *capacity.base));
  v1::PlanCapacityResponse reply;
  reply.set_adapter_bytes(adapter.bytes);
  const bool bounded = capacity.host_bytes < std::numeric_limits<int64_t>::max();
  reply.set_host_adapters(bounded ? capacity.host_bytes / std::max<int64_t>(adapter.bytes, 1) : -1);
  ImageSize image;
  if (capacity.images != nullptr) {
    LK_ASSIGN_OR_RETURN(image, capacity.images->Size(adapter));
    const int64_t blocks = (request.kv_tokens() + KvLayout::kPageTokens - 1) / KvLayout::kPageTokens;
    const int64_t left = capacity.pages - blocks * capacity.kv.pages_per_block;
    reply.set_device_adapters(ImagesIn(std::max<int64_t>(left, 0), image));
  } else {
    reply.set_device_adapters(-1);
  }
  const int64_t left = std::max<int64_t>(capacity.pages - PagesOf(request.adapters(), image), 0);
  reply.set_kv_tokens(left / capacity.kv.pages_per_block * KvLayout::kPageTokens);
  reply.set_image_bytes(image.bytes(capacity.kv.page_bytes()));
  return reply;
}

}  // namespace lorikeet
