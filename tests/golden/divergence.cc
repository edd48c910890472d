// How far next-token distributions move from `--precision exact`: of `--precision fast`, and of another
// program on the same model and tokens. Every position of every sequence counts, over the whole
// vocabulary.
//   divergence MODEL IDS [LOGITS]
// IDS: a sequence of token ids a line, at most 512 of them. LOGITS: the other program's float32
// logits, [positions of all sequences, vocab].
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "engine/base/check.h"
#include "tests/support/model_harness.h"

namespace lorikeet {
namespace {

using Logits = std::vector<float>;  // [vocab]

std::vector<double> LogSoftmax(const Logits& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float v : logits) sum += std::exp(v - top);
  std::vector<double> out;
  for (const float v : logits) out.push_back(v - top - std::log(sum));
  return out;
}

// One candidate's distances from the exact distributions.
class Divergence {
 public:
  void Add(const Logits& exact_logits, const Logits& logits) {
    const std::vector<double> exact = LogSoftmax(exact_logits);
    const std::vector<double> other = LogSoftmax(logits);
    double kl = 0, moved = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double p = std::exp(exact[i]);
      kl += p * (exact[i] - other[i]);
      moved += p * std::abs(exact[i] - other[i]);
    }
    kl_.push_back(kl);
    moved_ += moved;
    const int32_t best = ArgMax(exact_logits);
    best_moved_ = std::max(best_moved_, std::abs(exact[best] - other[best]));
    same_best_ += best == ArgMax(logits);
  }

  void Print(const char* name) {
    std::sort(kl_.begin(), kl_.end());
    const double count = static_cast<double>(kl_.size());
    double sum = 0;
    for (const double kl : kl_) sum += kl;
    std::printf("%-6s %6zu %10.3e %10.3e %10.3e %10.3e %12.5f %14.4f %9.2f%%\n", name, kl_.size(),
                sum / count, kl_[kl_.size() / 2], kl_[kl_.size() * 99 / 100], kl_.back(),
                moved_ / count, best_moved_, 100 * same_best_ / count);
  }

 private:
  std::vector<double> kl_;  // by position, in nats
  double moved_ = 0;        // Σ E|Δ log p|, the expectation over the exact distribution
  double best_moved_ = 0;   // largest |Δ log p| of the exact distribution's best token
  int64_t same_best_ = 0;
};

int Run(int argc, char** argv) {
  LK_CHECK_MSG(argc == 3 || argc == 4, "divergence MODEL IDS [LOGITS]");
  ModelHarness exact(argv[1], Precision::kExact, 1, ModelHarness::kMaxRows);
  ModelHarness fast(argv[1], Precision::kFast, 1, ModelHarness::kMaxRows);
  std::ifstream ids(argv[2]), logits;
  LK_CHECK_MSG(ids.good(), argv[2]);
  if (argc == 4) logits.open(argv[3], std::ios::binary);
  LK_CHECK_MSG(argc == 3 || logits.good(), argv[3]);
  Divergence of_fast, of_other;
  for (std::string line; std::getline(ids, line);) {
    std::istringstream in(line);
    Lane lane;
    for (int32_t id; in >> id;) lane.tokens.push_back(id);
    Lane again = lane;
    const std::vector<Logits> expected = exact.Run(&lane), got = fast.Run(&again);
    for (size_t i = 0; i < expected.size(); ++i) {
      of_fast.Add(expected[i], got[i]);
      if (argc == 3) continue;
      Logits other(expected[i].size());
      const auto bytes = static_cast<std::streamsize>(other.size() * sizeof(float));
      LK_CHECK_MSG(logits.read(reinterpret_cast<char*>(other.data()), bytes), argv[3]);
      of_other.Add(expected[i], other);
    }
  }
  std::printf("%-6s %6s %10s %10s %10s %10s %12s %14s %10s\n", "", "tokens", "mean KL", "median",
              "99 %", "max", "E|d log p|", "max |d| best", "same best");
  of_fast.Print("fast");
  if (argc == 4) of_other.Print("other");
  return 0;
}

}  // namespace
}  // namespace lorikeet

int main(int argc, char** argv) { return lorikeet::Run(argc, argv); }
