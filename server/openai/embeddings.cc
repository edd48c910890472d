#include "server/openai/embeddings.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/http/errors.h"

namespace lorikeet {
namespace {

constexpr size_t kMostOpen = 64;  // inputs in the engine at a time; the others wait here

class EmbeddingAnswer final : public HttpAnswer {
 public:
  EmbeddingAnswer(const ServingContext& context, Caller caller, EmbeddingRequest request,
                  std::function<void()> wake)
      : context_(context),
        caller_(std::move(caller)),
        request_(std::move(request)),
        wake_(std::move(wake)),
        calls_(request_.inputs.size()),
        values_(request_.inputs.size()) {}

  void Pump(HttpWriter& writer) override {
    bool more = true;
    while (more) {
      const absl::StatusOr<bool> advanced = Advance();
      if (!advanced.ok()) return writer.Reply(ErrorResponse(advanced.status()));
      more = *advanced;
    }
    if (done_ == calls_.size()) writer.Reply({.body = Dump(Whole())});
  }

 private:
  // Begins what there is room for and takes what has ended. False: nothing has.
  absl::StatusOr<bool> Advance() {
    for (; begun_ < calls_.size() && begun_ - done_ < kMostOpen; ++begun_) {
      auto call = GenerationCall::Start(context_, *caller_, std::move(request_.inputs[begun_]),
                                        wake_);
      if (!call.ok()) return InOpenAiNames(call.status(), NameOf(begun_));
      calls_[begun_] = *std::move(call);
    }
    bool advanced = false;
    for (size_t i = first_open_; i < begun_; ++i) {
      if (calls_[i] == nullptr) continue;
      const GenerationDelta delta = calls_[i]->Poll();
      if (!delta.end) continue;
      if (!delta.end->status.ok()) return InOpenAiNames(delta.end->status, NameOf(i));
      LK_RETURN_IF_ERROR(Take(i, *delta.end));
      advanced = true;
    }
    while (first_open_ < begun_ && calls_[first_open_] == nullptr) ++first_open_;
    return advanced;
  }

  absl::Status Take(size_t index, const GenerationEnd& end) {
    LK_ASSIGN_OR_RETURN(const std::vector<float> unit, end.embedding->Unit(request_.dimensions));
    if (request_.base64) {
      values_[index] = absl::Base64Escape(absl::string_view(
          reinterpret_cast<const char*>(unit.data()), unit.size() * sizeof(float)));
    } else {
      values_[index] = unit;
    }
    prompt_tokens_ += end.prompt_tokens;
    calls_[index].reset();
    ++done_;
    return absl::OkStatus();
  }

  std::string NameOf(size_t index) const {
    return calls_.size() == 1 ? "input" : absl::StrCat("input[", index, "]");
  }

  Json Whole() {
    Json data = Json::array();
    for (size_t i = 0; i < values_.size(); ++i) {
      data.push_back(
          {{"object", "embedding"}, {"index", i}, {"embedding", std::move(values_[i])}});
    }
    return {{"object", "list"},
            {"data", std::move(data)},
            {"model", request_.model},
            {"usage", {{"prompt_tokens", prompt_tokens_}, {"total_tokens", prompt_tokens_}}}};
  }

  const ServingContext& context_;
  const Caller caller_;
  EmbeddingRequest request_;
  const std::function<void()> wake_;
  std::vector<std::unique_ptr<GenerationCall>> calls_;  // [inputs] nullptr: not begun, or done
  std::vector<Json> values_;                            // [inputs] as they are answered
  size_t begun_ = 0;
  size_t done_ = 0;
  size_t first_open_ = 0;  // those before it are done
  int64_t prompt_tokens_ = 0;
};

}  // namespace

std::unique_ptr<HttpAnswer> StartEmbeddings(const ServingContext& context, Caller caller,
                                            EmbeddingRequest request, std::function<void()> wake) {
  return std::make_unique<EmbeddingAnswer>(context, std::move(caller), std::move(request),
                                           std::move(wake));
}

}  // namespace lorikeet
