#include "engine/kernels/cuda/step_arrays.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace lorikeet::cuda {
namespace {

constexpr int64_t kAlign = 16;
constexpr int64_t kLeastBytes = 1 << 20;

int64_t RoundUp(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

int32_t Chunks(int32_t position, int32_t chunk_pages) {
  return position / (chunk_pages * KvLayout::kPageTokens) + 1;
}

// One and a half times what each of two blocks a multiprocessor of a large device would have of all pages,
// as a power of two: long chunks spend less on beginnings and ends, short ones spread a long row.
int32_t ChunkPages(const StepInput& step, int32_t kv_heads) {
  constexpr int32_t kBlocks = 264, kLeast = 8, kMost = 256;
  int64_t pages = 0;
  for (size_t s = 0; s + 1 < step.sequence_begin.size(); ++s) {
    const int32_t begin = step.sequence_begin[s];
    if (step.sequence_begin[s + 1] - begin == 1) pages += Chunks(step.positions[begin], 1);
  }
  const int64_t wanted = pages * kv_heads * 3 / (2 * kBlocks);
  return static_cast<int32_t>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(wanted, kLeast, kMost))));
}

}  // namespace

void PlanAttention(const StepInput& step, int32_t kv_heads, bool all_prompts, StepWork* work) {
  const int32_t sequences = static_cast<int32_t>(step.sequence_begin.size()) - 1;
  work->chunk_pages = ChunkPages(step, kv_heads);
  work->decodes.clear();
  work->prompts.clear();
  for (int32_t s = 0; s < sequences; ++s) {
    const int32_t begin = step.sequence_begin[s], end = step.sequence_begin[s + 1];
    if (end - begin == 1 && !all_prompts) {
      const int32_t position = step.positions[begin];
      for (int32_t c = 0; c < Chunks(position, work->chunk_pages); ++c) {
        work->decodes.push_back({begin, position, c, step.page_begin[s]});
      }
      continue;
    }
    for (int32_t row = begin; row < end; row += kPromptRows) {
      work->prompts.push_back({row, std::min(row + kPromptRows, end), s, 0});
    }
  }
}

std::vector<DeviceSegment> LogitSegments(const std::vector<DeviceSegment>& segments,
                                         std::span<const int32_t> logit_rows) {
  std::vector<DeviceSegment> out;
  const auto index_of = [&](int32_t row) {
    const auto it = std::lower_bound(logit_rows.begin(), logit_rows.end(), row);
    return static_cast<int32_t>(it - logit_rows.begin());
  };
  for (DeviceSegment segment : segments) {
    segment.row_begin = index_of(segment.row_begin);
    segment.row_end = index_of(segment.row_end);
    if (segment.row_begin < segment.row_end) out.push_back(segment);
  }
  return out;
}

int64_t StepArrays::RowBytes(int32_t rows) {
  constexpr int64_t kBytesPerRow =
      kRowArrays * sizeof(int32_t) + sizeof(const AdapterParts*) + sizeof(const float*) + sizeof(RowTiles) +
      sizeof(ExtendedRow);
  static_assert(kRowArrays * sizeof(int32_t) % alignof(const AdapterParts*) == 0);
  static_assert(alignof(RowTiles) <= alignof(const AdapterParts*));
  static_assert(alignof(ExtendedRow) <= alignof(RowTiles));
  return RoundUp(kBytesPerRow * rows);
}

StepArrays::~StepArrays() {
  if (sent_ != nullptr) cudaEventDestroy(sent_);
  cudaFreeHost(host_);
  cudaFree(device_);
}

bool StepArrays::Reserve(int64_t bytes, cudaStream_t stream) {
  if (bytes <= capacity_) return false;
  cudaStreamSynchronize(stream);  // the step before may still read them
  cudaFreeHost(host_);
  cudaFree(device_);
  capacity_ = std::max(2 * bytes, kLeastBytes);
  errors_->Note(cudaMallocHost(reinterpret_cast<void**>(&host_), capacity_), "a step's arrays");
  errors_->Note(cudaMalloc(reinterpret_cast<void**>(&device_), capacity_), "a step's arrays");
  return true;
}

template <typename T>
const T* StepArrays::Append(std::span<const T> values) {
  const int64_t at = used_;
  std::memcpy(host_ + at, values.data(), values.size_bytes());
  used_ = RoundUp(at + static_cast<int64_t>(values.size_bytes()));
  return reinterpret_cast<const T*>(device_ + at);
}

void StepArrays::WriteRows(const StepInput& step, const StepWork& work) {
  const int32_t rows = rows_;
  int32_t* row_arrays = reinterpret_cast<int32_t*>(host_ + kHeaderBytes);
  std::fill_n(row_arrays, rows, 0);
  std::fill_n(row_arrays + rows, rows, -1);
  std::fill_n(row_arrays + 2 * int64_t{rows}, 2 * int64_t{rows}, 0);
  std::copy(step.tokens.begin(), step.tokens.end(), row_arrays);
  std::copy(step.positions.begin(), step.positions.end(), row_arrays + rows);
  for (int32_t s = 0; s + 1 < static_cast<int32_t>(step.sequence_begin.size()); ++s) {
    std::fill(row_arrays + 2 * int64_t{rows} + step.sequence_begin[s],
              row_arrays + 2 * int64_t{rows} + step.sequence_begin[s + 1], s);
  }
  int32_t* const adapted = row_arrays + 3 * int64_t{rows};
  for (const AdapterSegment& s : step.segments) std::fill(adapted + s.row_begin, adapted + s.row_end, kExtendsNone);
  for (const DeviceSegment& s : work.extension.segments) {
    std::fill(adapted + s.row_begin, adapted + s.row_end, kExtendsProducts);
  }
  auto* parts = reinterpret_cast<const AdapterParts**>(row_arrays + kRowArrays * rows);
  std::fill_n(parts, rows, nullptr);
  for (const PartsSegment& s : work.parts) {
    std::fill(parts + s.row_begin, parts + s.row_end, s.parts);
  }
  auto* gates = reinterpret_cast<const float**>(parts + rows);
  std::fill_n(gates, rows, nullptr);
  auto* tiles = reinterpret_cast<RowTiles*>(gates + rows);
  std::fill_n(tiles, rows, RowTiles());
  for (const DeviceSegment& s : work.experts) {
    std::fill(tiles + s.row_begin, tiles + s.row_end, RowTiles{s.tiles, s.tiles_per_module});
  }
  DescribeRows(work.extension, {reinterpret_cast<ExtendedRow*>(tiles + rows), static_cast<size_t>(rows)});
}

void StepArrays::AppendGates(std::span<const RowGates> rows) {
  const auto at = reinterpret_cast<const std::byte*>(gates()) - device_;
  auto* const of_row = reinterpret_cast<const float**>(host_ + at);
  for (const RowGates& row : rows) of_row[row.row] = Append(row.values);
}

bool StepArrays::Send(const StepInput& step, const StepWork& work, int32_t rows,
                      cudaStream_t stream) {
  if (sent_ == nullptr) {
    errors_->Note(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming), "an event");
  }
  errors_->Note(cudaEventSynchronize(sent_), "the copy of a step's arrays");
  const auto bytes = [](const auto& values) {
    return RoundUp(static_cast<int64_t>(values.size() * sizeof(values[0])));
  };
  int64_t need = kHeaderBytes + RowBytes(rows);
  need += bytes(step.logit_rows) + bytes(step.page_begin) + bytes(step.page_ids);
  need += bytes(work.decodes) + bytes(work.prompts) + bytes(work.extension.gathers) + bytes(work.mixed_rows);
  for (const LowRankWork* list : {&work.rows, &work.prompts_low_rank, &work.logits}) {
    need += bytes(list->shrinks) + bytes(list->expands);
  }
  for (const RowGates& row : work.gates) need += bytes(row.values);
  const bool moved = Reserve(need, stream);
  if (!errors_->status().ok()) return moved;
  rows_ = rows;
  WriteRows(step, work);
  used_ = kHeaderBytes + RowBytes(rows);

  AppendGates(work.gates);
  StepHeader header;
  logit_rows_ = Append(step.logit_rows);
  mixed_rows_ = Append(std::span(work.mixed_rows));
  gathers_ = Append(std::span(work.extension.gathers));
  header.attention = {static_cast<int32_t>(work.decodes.size()),
                      static_cast<int32_t>(work.prompts.size()),
                      work.chunk_pages,
                      Append(std::span(work.decodes)),
                      Append(std::span(work.prompts)),
                      Append(step.page_begin),
                      Append(step.page_ids)};
  const auto list = [&](const LowRankWork& from) {
    return LowRankList{static_cast<int32_t>(from.shrinks.size()),
                       static_cast<int32_t>(from.expands.size()), Append(std::span(from.shrinks)),
                       Append(std::span(from.expands))};
  };
  header.rows = list(work.rows);
  header.prompts = list(work.prompts_low_rank);
  header.logits = list(work.logits);
  std::memcpy(host_, &header, sizeof header);
  errors_->Note(cudaMemcpyAsync(device_, host_, used_, cudaMemcpyHostToDevice, stream),
                "the copy of a step's arrays");
  errors_->Note(cudaEventRecord(sent_, stream), "an event");
  return moved;
}

}  // namespace lorikeet::cuda
