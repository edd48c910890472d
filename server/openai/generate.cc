#include "server/openai/generate.h"

#include <string>
#include <utility>
#include <vector>

#include "engine/base/status_macros.h"
#include "server/http/errors.h"
#include "server/openai/output.h"

namespace lorikeet {
namespace {

constexpr size_t kPieceBytes = 64 << 10;  // after which a piece of a stream is sent

// The calls of a request, one a prompt, polled in turn. Choice c of prompt p has index p n + c.
class Calls {
 public:
  absl::Status Start(const ServingContext& context, const Identity& caller,
                     std::vector<GenerationInput> inputs, const std::function<void()>& wake) {
    choices_each_ = inputs.front().choices;
    for (GenerationInput& input : inputs) {
      LK_ASSIGN_OR_RETURN(calls_.emplace_back(),
                          GenerationCall::Start(context, caller, std::move(input), wake));
    }
    open_ = calls_.size();
    return absl::OkStatus();
  }

  // As GenerationCall::Poll; `last`: of all calls.
  GenerationDelta Poll() {
    for (size_t i = 0; i < calls_.size(); ++i) {
      const size_t prompt = std::exchange(next_, (next_ + 1) % calls_.size());
      GenerationDelta delta = calls_[prompt]->Poll();
      if (delta.empty()) continue;
      const bool failed = delta.end && !delta.end->status.ok();
      if (delta.last && !failed) delta.last = --open_ == 0;
      delta.choice += static_cast<int32_t>(prompt) * choices_each_;
      return delta;
    }
    return {};
  }

  int32_t choices() const { return static_cast<int32_t>(calls_.size()) * choices_each_; }
  bool FirstOfPrompt(int32_t choice) const { return choice % choices_each_ == 0; }

 private:
  std::vector<std::unique_ptr<GenerationCall>> calls_;
  int32_t choices_each_ = 1;
  size_t next_ = 0;
  size_t open_ = 0;
};

bool Failed(const GenerationDelta& delta) { return delta.end && !delta.end->status.ok(); }

class WholeAnswer final : public HttpAnswer {
 public:
  WholeAnswer(Calls calls, OutputOptions options)
      : calls_(std::move(calls)),
        writer_(std::move(options), calls_.choices()),
        wholes_(calls_.choices()) {}

  void Pump(HttpWriter& writer) override {
    while (true) {
      GenerationDelta delta = calls_.Poll();
      if (delta.empty()) return;
      if (Failed(delta)) return writer.Reply(ErrorResponse(InOpenAiNames(delta.end->status, "prompt")));
      const bool last = delta.last;
      wholes_[delta.choice].Append(std::move(delta));
      if (last) break;
    }
    Json choices = Json::array();
    for (int32_t i = 0; i < calls_.choices(); ++i) {
      writer_.Count(*wholes_[i].end, calls_.FirstOfPrompt(i));
      choices.push_back(writer_.Whole(i, wholes_[i]));
    }
    writer.Reply({.body = Dump(writer_.Response(std::move(choices)))});
  }

 private:
  Calls calls_;
  OutputWriter writer_;
  std::vector<GenerationDelta> wholes_;  // [choices] so far
};

// The head is sent with the first token, so that what fails before it has a status of its own.
class StreamedAnswer final : public HttpAnswer {
 public:
  StreamedAnswer(Calls calls, OutputOptions options)
      : calls_(std::move(calls)), writer_(std::move(options), calls_.choices()) {}

  void Pump(HttpWriter& writer) override {
    piece_.clear();
    bool last = false;
    while (!last && piece_.size() < kPieceBytes) {
      const GenerationDelta delta = calls_.Poll();
      if (delta.empty()) break;
      last = delta.last;
      if (Failed(delta)) return Fail(delta.end->status, writer);
      if (delta.end) writer_.Count(*delta.end, calls_.FirstOfPrompt(delta.choice));
      writer_.AppendEvents(delta.choice, delta, &piece_);
    }
    if (last) writer_.AppendEnd(&piece_);
    if (piece_.empty()) return;
    Send(writer);
    if (last) writer.EndStream();
  }

 private:
  void Send(HttpWriter& writer) {
    if (!std::exchange(started_, true)) writer.StartStream("text/event-stream; charset=utf-8");
    writer.Write(piece_);
  }

  void Fail(const absl::Status& status, HttpWriter& writer) {
    const absl::Status named = InOpenAiNames(status, "prompt");
    if (!started_ && piece_.empty()) return writer.Reply(ErrorResponse(named));
    AppendEvent(ErrorBody(named), &piece_);
    AppendEvent("[DONE]", &piece_);
    Send(writer);
    writer.EndStream();
  }

  Calls calls_;
  OutputWriter writer_;
  std::string piece_;
  bool started_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpAnswer>> StartGeneration(const ServingContext& context,
                                                            const Identity& caller,
                                                            OpenAiRequest request,
                                                            const std::function<void()>& wake) {
  Calls calls;
  const absl::Status status = calls.Start(context, caller, std::move(request.inputs), wake);
  if (!status.ok()) return InOpenAiNames(status, "prompt");
  std::unique_ptr<HttpAnswer> answer;
  if (request.output.stream) {
    answer = std::make_unique<StreamedAnswer>(std::move(calls), std::move(request.output));
  } else {
    answer = std::make_unique<WholeAnswer>(std::move(calls), std::move(request.output));
  }
  return answer;
}

}  // namespace lorikeet
