#include "engine/kernels/cuda/cuda_backend.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/check.h"
#include "engine/base/status_macros.h"
#include "engine/kernels/cuda/elementwise.h"
#include "engine/kernels/cuda/find_device.h"
#include "engine/kernels/cuda/model_parts.h"

namespace lorikeet::cuda {
namespace {

constexpr int32_t kMaxRecordedRows = 256;
constexpr size_t kMostGraphs = 256;  // kept; each takes about a megabyte of the device
constexpr int32_t kLongestShortSegment = 32;  // rows
constexpr int32_t kFewLongRows = 1024;        // of long segments: not worth kernels of their own
constexpr int32_t kFewestExtendedRows = 256;  // of long segments: worth waiting for their shrink
static_assert(kFewLongRows >= kMaxRecordedRows, "what is recorded is the kernels of short segments");
// Of what weights and activations leave, the share of the KV pages; adapters have the rest but for
// what scratch, recorded steps and cuBLAS take.
constexpr int64_t kReservedBytes = int64_t{2} << 30;
constexpr double kGiB = 1 << 30;
constexpr int32_t kMostThreads = 32;  // of the host: to load weights, and for masks

DType ActivationType(const BackendOptions& options) {
  if (options.precision == Precision::kExact) return DType::kF32;
  return options.stored == DType::kF16 ? DType::kF16 : DType::kBF16;
}

int64_t PinnedBytes(const BackendOptions& options) {
  if (options.pinned_bytes > 0) return options.pinned_bytes;
  const int64_t memory = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  return std::min(memory / 4, int64_t{32} << 30);
}

int32_t Threads(const BackendOptions& options) {
  const int32_t cores = static_cast<int32_t>(std::thread::hardware_concurrency());
  return options.threads > 0 ? options.threads : std::clamp(cores, 1, kMostThreads);
}

}  // namespace

CudaBackend::CudaBackend(const BackendOptions& options, const cudaDeviceProp& device,
                         cudaStream_t stream)
    : options_(options),
      device_name_(device.name),
      dtype_(ActivationType(options)),
      stream_(stream),
      threads_(Threads(options)),
      gemm_(&errors_, options.batch_invariant),
      arrays_(&errors_),
      sampler_(&errors_, stream),
      adapters_(dtype_, options.experts, stream) {
  Note(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "a stream");
  for (cudaEvent_t* event : {&fork_, &join_}) {
    Note(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "an event");
  }
}

CudaBackend::~CudaBackend() {
  cudaStreamSynchronize(stream_);
  DropGraphs();
  cudaEventDestroy(fork_);
  cudaEventDestroy(join_);
  cudaStreamDestroy(side_);
  cudaStreamDestroy(stream_);
}

std::string CudaBackend::Describe() const {
  return absl::StrCat("cuda (", device_name_, ", ", Info(dtype_).name, ")");
}

std::vector<int32_t> CudaBackend::slow_first_rows() const {
  std::vector<int32_t> rows;
  for (int32_t r = options_.max_rows; r > 0; --r) {
    const int32_t padded = std::min(PaddedRows(r), options_.max_rows);
    if (rows.empty() || padded < rows.back()) rows.push_back(padded);
  }
  return rows;
}

// ---- load time

std::byte* CudaBackend::AllocateRaw(int64_t bytes, const char* what) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, std::max<int64_t>(bytes, 1));
  if (error != cudaErrorMemoryAllocation) {
    Note(error, what);
    return static_cast<std::byte*>(memory);
  }
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  errors_.Note(absl::ResourceExhaustedError(
      absl::StrFormat("%s needs %.2f GiB of GPU memory; %.2f of %.2f GiB are free on %s", what,
                      bytes / kGiB, free / kGiB, total / kGiB, device_name_)));
  return nullptr;
}

DeviceMemory CudaBackend::Allocate(int64_t bytes) {
  std::byte* memory = AllocateRaw(bytes, "a buffer");
  if (memory != nullptr) Note(cudaMemsetAsync(memory, 0, bytes, stream_), "clearing a buffer");
  return DeviceMemory(memory, [](std::byte* p) { cudaFree(p); });
}

DeviceMemory CudaBackend::Upload(std::span<const float> values) {
  DeviceMemory memory = Allocate(values.size_bytes());
  if (memory == nullptr) return memory;
  Note(cudaMemcpyAsync(memory.get(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice,
                       stream_), "the copy of a vector");
  Note(cudaStreamSynchronize(stream_), "the copy of a vector");
  return memory;
}

int32_t CudaBackend::AllocatePages(const KvLayout& layout, int64_t bytes) {
  if (options_.experts.layers > 0) ReserveExperts();
  if (bytes == 0) {
    size_t free = 0, total = 0;
    Note(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    const int64_t spare = static_cast<int64_t>(free);
    bytes = std::max(spare - kReservedBytes, spare / 2);
  }
  layout_ = layout;
  pool_bytes_ = bytes;
  const int64_t pages = std::min<int64_t>(bytes / layout.page_bytes(), INT32_MAX);
  pages_ = DeviceMemory(AllocateRaw(pages * layout.page_bytes(), "the pool of pages"),
                        [](std::byte* p) { cudaFree(p); });
  arrived_ = Allocate(int64_t{options_.max_rows} * query_group_ * layout.kv_heads *
                      int64_t{sizeof(int32_t)});
  if (pages_ == nullptr) return 0;
  errors_.Note(adapters_.Start(pages_.get(), layout.page_bytes(), PinnedBytes(options_)));
  return static_cast<int32_t>(pages);
}

// A copy inside the pool, which reads and writes every byte once.
double CudaBackend::MeasureBandwidth() {
  constexpr int64_t kMostBytes = int64_t{1} << 30;
  constexpr int kCopies = 4;  // the first one warms up
  const int64_t bytes = std::min(kMostBytes, pool_bytes_ / 2);
  cudaEvent_t begin = nullptr, end = nullptr;
  Note(cudaEventCreate(&begin), "an event");
  Note(cudaEventCreate(&end), "an event");
  double best_ms = 0;
  for (int i = 0; i < kCopies && status().ok(); ++i) {
    Note(cudaEventRecord(begin, stream_), "an event");
    Note(cudaMemcpyAsync(pages_.get() + bytes, pages_.get(), bytes, cudaMemcpyDeviceToDevice,
                         stream_),
         "a copy to measure");
    Note(cudaEventRecord(end, stream_), "an event");
    Note(cudaEventSynchronize(end), "a copy to measure");
    float took_ms = 0;
    Note(cudaEventElapsedTime(&took_ms, begin, end), "a copy to measure");
    if (i > 0 && (best_ms == 0 || took_ms < best_ms)) best_ms = took_ms;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best_ms > 0 ? 2e3 * static_cast<double>(bytes) / best_ms : 0;
}

MemoryUse CudaBackend::memory_use() const {
  constexpr auto kKeep = std::chrono::seconds(1);
  std::lock_guard<std::mutex> lock(memory_mutex_);
  const auto now = std::chrono::steady_clock::now();
  if (memory_use_.total != 0 && now - memory_asked_ < kKeep) return memory_use_;
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return {};
  memory_asked_ = now;
  memory_use_ = {.used = static_cast<int64_t>(total - free), .total = static_cast<int64_t>(total)};
  return memory_use_;
}

void CudaBackend::ParallelFor(int32_t n, const std::function<void(int32_t, int32_t)>& fn) {
  threads_.ParallelFor(n, fn);
}

// ---- a step

void CudaBackend::PlanAdapters(const StepInput& step) {
  std::vector<DeviceSegment> segments;
  linears_ = 0;
  part_set_ = 0;
  work_.parts.clear();
  work_.gates.clear();
  work_.experts.clear();
  work_.mixed_rows.clear();
  work_.mixture_chosen = 0;
  for (const AdapterSegment& segment : step.segments) {
    const DeviceAdapter& adapter = adapters_.Get(*segment.adapter);
    segments.push_back(
        {segment.row_begin, segment.row_end, adapter.tiles, adapter.tiles_per_module});
    linears_ |= adapter.linears;
    part_set_ |= adapter.part_set;
    if ((adapter.part_set & (Bit(Part::kExperts) | Bit(Part::kMixture))) != 0) work_.experts.push_back(segments.back());
    if ((adapter.part_set & Bit(Part::kMixture)) != 0) {
      for (int32_t r = segment.row_begin; r < segment.row_end; ++r) work_.mixed_rows.push_back(r);
      work_.mixture_chosen = std::max(work_.mixture_chosen, segment.adapter->mlp_mixture.chosen);
    }
    if (adapter.parts == nullptr) continue;
    work_.parts.push_back({segment.row_begin, segment.row_end, adapter.parts});
    const size_t gates = segment.adapter->gating.width();
    for (int32_t r = segment.row_begin; gates > 0 && r < segment.row_end; ++r) {
      work_.gates.push_back({r, {step.gates[r], gates}});
    }
  }
  // Few rows make few tasks: small tiles spread them, though more of them read the same factors.
  const auto is_short = [](const DeviceSegment& s) {
    return s.row_end - s.row_begin <= kLongestShortSegment;
  };
  std::vector<DeviceSegment> long_segments;
  std::copy_if(segments.begin(), segments.end(), std::back_inserter(long_segments), std::not_fn(is_short));
  int32_t long_rows = 0;
  for (const DeviceSegment& s : long_segments) long_rows += s.row_end - s.row_begin;
  const bool extends = long_rows >= kFewestExtendedRows && ExtendsProducts(long_segments);
  const bool all_short = options_.batch_invariant || (!extends && long_rows <= kFewLongRows);
  const auto middle = std::stable_partition(
      segments.begin(), segments.end(),
      [&](const DeviceSegment& s) { return all_short || is_short(s); });
  if (!extends) long_segments.clear();
  PlanExtension(long_segments, &work_.extension);
  PlanLowRank({segments.begin(), middle}, kDecodeTileRows, &work_.rows);
  PlanLowRank({middle, segments.end()}, kPromptTileRows, &work_.prompts_low_rank);
  std::sort(segments.begin(), segments.end(),
            [](const auto& a, const auto& b) { return a.row_begin < b.row_begin; });
  PlanLowRank(LogitSegments(segments, step.logit_rows), kDecodeTileRows, &work_.logits);
}

bool CudaBackend::Grow(int64_t count, int64_t element_bytes, int64_t* capacity,
                       DeviceMemory* memory) {
  if (count <= *capacity) return false;
  Note(cudaStreamSynchronize(stream_), "a step");
  memory->reset();
  *capacity = count + count / 2;
  *memory = Allocate(*capacity * element_bytes);
  return true;
}

int64_t CudaBackend::SlotsOf(const LowRankWork& work) const {
  if (dtype_ == DType::kF32) return 0;  // its kernel keeps none
  // One slice more holds what prompts keep in 16 bits.
  const auto items = static_cast<int64_t>(work.shrinks.size());
  return items * (slots_per_item_ + kMaxParts) * work.tile_rows * kTileRanks;
}

bool CudaBackend::GrowScratch() {
  const int32_t heads = query_group_ * layout_.kv_heads;
  const int64_t partials = PartialFloats(static_cast<int64_t>(work_.decodes.size()), heads,
                                         layout_.head_dim);
  // Short segments may be at work beside long ones that extend a product.
  const int64_t most =
      std::max(SlotsOf(work_.rows) + SlotsOf(work_.prompts_low_rank), SlotsOf(work_.logits));
  bool moved = Grow(most, sizeof(float), &slot_floats_, &slots_);
  moved |= Grow(partials, sizeof(float), &partial_floats_, &partials_);
  return moved;
}

int32_t CudaBackend::BeginStep(const StepInput& step) {
  const int32_t rows = static_cast<int32_t>(step.tokens.size());
  const bool decoding = step.sequence_begin.size() == step.tokens.size() + 1;
  const bool records = options_.record && !options_.batch_invariant;
  recordable_ = records && decoding && rows <= std::min(kMaxRecordedRows, options_.max_rows);
  rows_ = std::min(PaddedRows(rows), options_.max_rows);
  PlanAttention(step, layout_.kv_heads, options_.batch_invariant, &work_);
  PlanAdapters(step);
  // What these launch is not a function of the number of rows.
  recordable_ &= work_.extension.segments.empty() && work_.mixed_rows.empty();
  bool moved = GrowScratch();
  moved |= arrays_.Send(step, work_, rows_, stream_);
  if (moved) DropGraphs();
  return rows_;
}

bool CudaBackend::ExtendsProducts(std::span<const DeviceSegment> long_segments) const {
  const bool alone = !Has(Part::kOutScale) && !Has(Part::kBias) && !Has(Part::kBottlenecks) &&
                     !Has(Part::kScaledPairs) && !Has(Part::kMixture);
  return alone && !options_.batch_invariant && ExtensionColumns(long_segments, 1) <= most_room_;
}

void CudaBackend::DropGraphs() {
  for (const auto& [key, recorded] : graphs_) {
    if (recorded.graph != nullptr) cudaGraphExecDestroy(recorded.graph);
  }
  graphs_.clear();
}

cudaGraphExec_t CudaBackend::Record(const std::function<void()>& operations) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Note(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording a step");
  operations();
  Note(cudaStreamEndCapture(stream_, &graph), "recording a step");
  if (!errors_.status().ok()) return nullptr;
  Note(cudaGraphInstantiate(&executable, graph, 0), "recording a step");
  cudaGraphDestroy(graph);
  return executable;
}

void CudaBackend::Run(const std::function<void()>& forward) {
  if (!errors_.status().ok()) return;
  const auto operations = [&] {
    forward();
    LK_CHECK_MSG(pending_y_ == nullptr && held_.y.data == nullptr, "a product, or the adapters' part, was left behind");
  };
  if (!recordable_) return operations();
  if (graphs_.size() >= kMostGraphs) DropGraphs();
  // The head's product is not among what is recorded.
  Recorded& recorded = graphs_[{rows_, linears_ & ~kHeadLinears, part_set_}];
  if (!recorded.seen) {
    recorded.seen = true;
    return operations();
  }
  if (recorded.graph == nullptr) recorded.graph = Record(operations);
  if (recorded.graph != nullptr) Note(cudaGraphLaunch(recorded.graph, stream_), "a step");
}

void CudaBackend::Embed(Matrix out) {
  if (Has(Part::kEmbedding)) {
    Note(LaunchAdaptedEmbed(embedding_.get(), dtype_, arrays_.tokens(), AdaptersOf(RowSet::kAll), out,
                            stream_), "embed");
    return;
  }
  Note(LaunchEmbed(embedding_.get(), dtype_, arrays_.tokens(), out, stream_), "embed");
}

void CudaBackend::AddRmsNorm(const NormArgs& args) {
  const RowAdapters adapters = Has(Part::kNorms) ? AdaptersOf(RowSet::kAll) : RowAdapters();
  Note(LaunchAddRmsNorm(args, TakeBeside(args.delta.data), arrays_.logit_rows(), adapters,
                        options_.batch_invariant, stream_), "norm");
}

LowRankArgs CudaBackend::LowRankOf(const LinearArgs& args, const LowRankWork& work,
                                   const LowRankList* list) const {
  LowRankArgs out;
  out.list = list;
  out.tile_rows = work.tile_rows;
  // A recorded launch serves steps to come: ranks up to 64 find a block each.
  constexpr int32_t kExpectedTiles = 4;
  const bool recorded = recordable_ && args.rows == RowSet::kAll;
  out.expected_expands = recorded ? rows_ : static_cast<int32_t>(work.expands.size());
  out.expected_shrinks =
      recorded ? kExpectedTiles * rows_ : static_cast<int32_t>(work.shrinks.size());
  out.slots = reinterpret_cast<float*>(slots_.get());
  out.max_tiles = work.max_tiles;
  out.long_ranks = Has(Part::kLongRanks);
  out.first_module = args.weight->first_module;
  out.parts = static_cast<int32_t>(args.weight->out.size());
  std::copy(args.weight->out.begin(), args.weight->out.end(), out.out);
  out.x = args.x;
  out.y = args.y;
  out.first_row = args.first_row;
  if (Has(Part::kScaledPairs)) out.scaled = AdaptersOf(args.rows, args.first_row);
  out.shares = reinterpret_cast<const float*>(shares_.get());
  return out;
}

// To `y`, args.y or what stands for it.
void CudaBackend::MultiplyLowRank(const LinearArgs& args, Matrix y, bool add, Segments segments,
                                  cudaStream_t stream) {
  const StepHeader* header = arrays_.header();
  if (Has(Part::kPrototypes)) DealShares(args, stream);
  const auto multiply = [&](const LowRankWork& work, const LowRankList* list) {
    if (work.expands.empty()) return;
    LowRankArgs low_rank = LowRankOf(args, work, list);
    low_rank.y = y;
    low_rank.add = add;
    if (dtype_ == DType::kF32) {
      Note(LaunchLowRankFloat(low_rank, stream), "low rank");
      return;
    }
    Note(LaunchShrink(low_rank, stream), "shrink");
    Note(LaunchExpand(low_rank, stream), "expand");
  };
  if (args.rows == RowSet::kLogits) return multiply(work_.logits, &header->logits);
  multiply(work_.rows, &header->rows);
  if (segments == Segments::kAll) multiply(work_.prompts_low_rank, &header->prompts);
}

int32_t CudaBackend::ExtensionColumnsOf(const LinearArgs& args) const {
  const auto& weight = static_cast<const CudaLinearWeight&>(*args.weight);
  const std::vector<DeviceSegment>& segments = work_.extension.segments;
  if (segments.empty() || args.x.rows != rows_ || weight.is_coded) return 0;
  const int32_t columns = ExtensionColumns(segments, static_cast<int32_t>(weight.out.size()));
  return columns <= std::min<int64_t>(args.x_room, weight.rows.stride - weight.in) ? columns : 0;
}

void CudaBackend::Extend(const LinearArgs& args, int32_t columns) {
  const auto& weight = static_cast<const CudaLinearWeight&>(*args.weight);
  LowRankArgs low_rank = LowRankOf(args, work_.prompts_low_rank, &arrays_.header()->prompts);
  low_rank.slots += SlotsOf(work_.rows);  // which are in use beside
  const Extension extension{.values = args.x.Columns(weight.in, columns),
                            .factors = weight.rows.Columns(weight.in, columns),
                            .rows = arrays_.extended_rows(),
                            .gathers = arrays_.gathers(),
                            .gather_count = static_cast<int32_t>(work_.extension.gathers.size())};
  Note(LaunchExtend(low_rank, extension, stream_), "an extension");
}

// Long segments extend the product where it can be. Other low-rank products read what the base product
// reads and run beside it. Their result is kept apart where y's reader can add it; where an adapter of the
// step does more to y, or rounding must not depend on that, expanding comes after the product.
void CudaBackend::LinearProducts(const LinearArgs& args) {
  const CudaLinearWeight& weight = static_cast<const CudaLinearWeight&>(*args.weight);
  const bool adapted = Has(LinearPart::kAny, args);
  const bool rotated = Has(LinearPart::kInputRotation, args);
  const bool sums = Has(LinearPart::kSum, args), outputs = Has(LinearPart::kOutput, args);
  const bool whole = rotated || sums || outputs || Has(Part::kOutScale) || Has(Part::kBottlenecks) ||
                     Has(Part::kMixture);
  const int32_t extension = adapted && !whole ? ExtensionColumnsOf(args) : 0;
  const Segments left = extension > 0 ? Segments::kShort : Segments::kAll;
  const bool can_be_apart = !whole && dtype_ != DType::kF32 && !options_.batch_invariant;
  const bool apart = adapted && args.reader != Reader::kAny && can_be_apart;
  if (apart) MultiplyApart(args, left);
  if (extension > 0) Extend(args, extension);
  const bool plain = !rotated && !weight.is_coded && weight.bias == nullptr && pending_y_ == nullptr;
  if (args.reader == Reader::kSwiGlu && plain && (!adapted || apart)) {
    held_ = {weight.rows, args.x, args.y, extension};
    return;
  }
  if (rotated) MultiplyRotated(args);
  else if (extension > 0) gemm_.MultiplyExtended(weight.rows, args.x, args.y, extension, stream_);
  else Multiply(weight, args.x, args.y, apart);
  if (sums) Note(LaunchAddStructured(StructuredOf(args), stream_), "structured deltas");
  if (adapted && !apart) MultiplyLowRank(args, args.y, true, left, stream_);
  AddBias(weight, args.y);
  if (outputs) Note(LaunchAdaptOutputs(StructuredOf(args), stream_), "outputs");
}

void CudaBackend::Multiply(const CudaLinearWeight& weight, Matrix x, Matrix y, bool beside) {
  if (weight.is_coded) {
    Note(LaunchCodedGemm(weight.coded, x, y, stream_, options_.batch_invariant), "a product of codes");
    return;
  }
  gemm_.Multiply(weight.rows, x, y, stream_, beside);
}

void CudaBackend::AddBias(const CudaLinearWeight& weight, Matrix y) {
  if (weight.bias == nullptr) return;
  Note(LaunchAddBias(y, reinterpret_cast<const float*>(weight.bias.get()), stream_), "bias");
}

void CudaBackend::MultiplyApart(const LinearArgs& args, Segments segments) {
  if (segments == Segments::kShort && work_.rows.expands.empty()) return;
  DeviceMemory& memory = deltas_[args.y.data];
  if (memory == nullptr) {
    memory = Allocate(ByteSize(args.y.dtype, int64_t{options_.max_rows} * args.y.stride));
  }
  Matrix delta = args.y;
  delta.data = memory.get();
  Note(cudaEventRecord(fork_, stream_), "an event");
  Note(cudaStreamWaitEvent(side_, fork_), "an event");
  MultiplyLowRank(args, delta, false, segments, side_);
  Note(cudaEventRecord(join_, side_), "an event");
  LK_CHECK_MSG(pending_y_ == nullptr, "a product was not read");
  pending_ = {delta, arrays_.adapted(), kExtendsNone | (segments == Segments::kAll ? kExtendsProducts : 0)};
  pending_y_ = args.y.data;
}

Beside CudaBackend::TakeBeside(const void* data) {
  if (data == nullptr || data != pending_y_) return {};
  Note(cudaStreamWaitEvent(stream_, join_), "an event");
  pending_y_ = nullptr;
  return pending_;
}

KvStep CudaBackend::KvOf() const {
  KvStep step;
  step.layout = layout_;
  step.pages = pages_.get();
  step.page_count = static_cast<int32_t>(pool_bytes_ / layout_.page_bytes());
  step.positions = arrays_.positions();
  step.row_sequence = arrays_.row_sequence();
  step.list = &arrays_.header()->attention;
  step.prompts = static_cast<int32_t>(work_.prompts.size());
  step.decoding = !work_.decodes.empty();
  step.partials = reinterpret_cast<float*>(partials_.get());
  step.arrived = reinterpret_cast<int32_t*>(arrived_.get());
  return step;
}

void CudaBackend::RopeStore(const RopeStoreArgs& args) {
  Note(LaunchRopeStore(args, TakeBeside(args.q.data), KvOf(), stream_), "rotary");
  if (!Has(Part::kPrefix)) return;
  Note(LaunchStorePrefix(arrays_.tokens(), AdaptersOf(RowSet::kAll), args.layer, args.q.rows, KvOf(),
                         stream_), "prefixes");
}

void CudaBackend::Attention(const AttentionArgs& args) {
  Note(LaunchAttention(args, KvOf(), stream_), "attention");
  if (!Has(Part::kPromptAttention)) return;
  Note(LaunchPromptAttention(args, layout_.kv_heads, layout_.head_dim, AdaptersOf(RowSet::kAll),
                             stream_), "attention to prompts");
}

void CudaBackend::SwiGlu(Matrix gate_up, Matrix out) {
  if (held_.y.data != nullptr) {
    LK_CHECK_MSG(held_.y.data == gate_up.data, "a product was not read");
    gemm_.MultiplyGated(held_.weight, held_.x, held_.y, out, held_.more, stream_);
    held_ = {};
    return;
  }
  Note(LaunchSwiGlu(gate_up, TakeBeside(gate_up.data), out, stream_), "activation");
}

// ---- results

absl::Status CudaBackend::Download(const float* from, std::span<float> to) {
  Note(cudaMemcpyAsync(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost, stream_),
       "a result");
  Note(cudaStreamSynchronize(stream_), "a step");
  return errors_.status();
}

absl::Status CudaBackend::Sample(Matrix logits, std::span<const LogitRow> rows,
                                 std::span<SampledToken> out) {
  if (errors_.status().ok()) sampler_.Sample(logits, rows, out);
  // Biased and constrained rows are few: the host samples them.
  for (size_t i = 0; i < rows.size() && errors_.status().ok(); ++i) {
    if (rows[i].target >= 0 || !HasEdits(rows[i])) continue;
    host_logits_.resize(rows[i].width(logits.width));
    LK_RETURN_IF_ERROR(Download(logits.row(i), host_logits_));
    lorikeet::Sample(host_logits_, rows[i], &host_scratch_, &out[i]);
  }
  return errors_.status();
}

}  // namespace lorikeet::cuda

namespace lorikeet {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions& options) {
  if (options.experts.experts > cuda::kMaxExperts || options.experts_per_token > cuda::kMaxChosenExperts) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "the model has %d experts a layer, %d a token; a GPU takes %d and %d; set device to cpu",
        options.experts.experts, options.experts_per_token, cuda::kMaxExperts, cuda::kMaxChosenExperts));
  }
  LK_ASSIGN_OR_RETURN(const cudaDeviceProp device, cuda::FindDevice());
  if (options.quantization != Quantization::kNone && !cuda::CanMultiplyCoded()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("quantization fp8 needs compute capability 9.0 and a build for 90a; %s has %d.%d", device.name,
                        device.major, device.minor));
  }
  if (options.batch_invariant && cuda::ActivationType(options) == DType::kF32) {
    // Of float32 there are cuBLASLt's products alone, and what those do depends on the number of rows.
    return absl::FailedPreconditionError(
        "batch-invariant on a GPU is for precision fast, and this model would be computed in float32; set precision "
        "to fast, or device to cpu");
  }
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return cuda::ToStatus(error, "a stream");
  auto backend = std::make_unique<cuda::CudaBackend>(options, device, stream);
  LK_RETURN_IF_ERROR(backend->status());
  return backend;
}

}  // namespace lorikeet
