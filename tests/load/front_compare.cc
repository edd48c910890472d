// Compares the throughput of a running server's two fronts, in rounds that alternate:
//
//   front_compare HTTP_PORT GRPC_PORT [STREAMS [TOKENS [ROUNDS]]]
//
// A round is STREAMS answers of TOKENS tokens at the same time, streamed, each read by a thread that
// waits; the first round of each front warms up. Where the machine's speed changes, the differences of
// pairs of rounds say more than the medians of all.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/check.h"
#include "lorikeet/v1/generation.grpc.pb.h"
#include "tests/e2e/http_client.h"

namespace lorikeet {
namespace {

constexpr char kPrompt[] = "Once upon a time";

// The answers go on to the last token, so the work of both is the same.
void ReadHttp(int port, const std::string& model, int tokens) {
  HttpClient client(port);
  client.SendPost("/v1/completions",
                  absl::StrCat(R"({"model":")", model, R"(","prompt":")", kPrompt,
                               R"(","stream":true,"ignore_eos":true,"temperature":0,"max_tokens":)",
                               tokens, "}"));
  const HttpResult result = client.Receive();
  LK_CHECK_MSG(result.status == 200 && result.events().back() == "[DONE]", result.body);
}

void ReadGrpc(v1::GenerationService::Stub* stub, int tokens) {
  v1::GenerateRequest request;
  request.set_text(kPrompt);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stop()->set_max_tokens(tokens);
  request.mutable_stop()->set_ignore_eos(true);
  grpc::ClientContext context;
  const auto reader = stub->Generate(&context, request);
  int read = 0;
  for (v1::GenerateResponse message; reader->Read(&message);) read += message.token_ids_size();
  const grpc::Status status = reader->Finish();
  LK_CHECK_MSG(status.ok() && read == tokens, status.error_message());
}

// Tokens a second of one round.
double Round(int streams, int tokens, const std::function<void()>& read) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> readers;
  for (int i = 0; i < streams; ++i) readers.emplace_back(read);
  for (std::thread& reader : readers) reader.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return streams * tokens / took.count();
}

// The value that `share` of all are below.
double Quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
}

int Main(int argc, char** argv) {
  LK_CHECK_MSG(argc > 2, "front_compare HTTP_PORT GRPC_PORT [STREAMS [TOKENS [ROUNDS]]]");
  const int http_port = std::atoi(argv[1]);
  const int streams = argc > 3 ? std::atoi(argv[3]) : 8;
  const int tokens = argc > 4 ? std::atoi(argv[4]) : 200;
  const int rounds = argc > 5 ? std::atoi(argv[5]) : 9;
  const auto stub = v1::GenerationService::NewStub(grpc::CreateChannel(
      absl::StrCat("127.0.0.1:", argv[2]), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::GetModelResponse model;
  const grpc::Status status = stub->GetModel(&context, v1::GetModelRequest(), &model);
  LK_CHECK_MSG(status.ok(), status.error_message());

  const std::function<void()> read_http = [&] { ReadHttp(http_port, model.name(), tokens); };
  const std::function<void()> read_grpc = [&] { ReadGrpc(stub.get(), tokens); };
  std::vector<double> http, grpc, more;  // of a pair, HTTP's more, in per cent
  for (int i = 0; i <= rounds; ++i) {
    const double of_http = Round(streams, tokens, read_http);
    const double of_grpc = Round(streams, tokens, read_grpc);
    if (i == 0) continue;
    http.push_back(of_http);
    grpc.push_back(of_grpc);
    more.push_back(100 * (of_http / of_grpc - 1));
  }
  std::printf("%d pairs of rounds of %d streams of %d tokens: medians HTTP %.1f, gRPC %.1f tokens a "
              "second; HTTP's more in a pair: median %+.2f %%, quartiles %+.2f and %+.2f %%\n",
              rounds, streams, tokens, Quantile(http, 0.5), Quantile(grpc, 0.5),
              Quantile(more, 0.5), Quantile(more, 0.25), Quantile(more, 0.75));
  return 0;
}

}  // namespace
}  // namespace lorikeet

int main(int argc, char** argv) { return lorikeet::Main(argc, argv); }
