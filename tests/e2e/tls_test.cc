// TLS on both ports: who is believed, client certificates as identities, certificates that change.
#include <gmock/gmock.h>
#include <openssl/ssl.h>

#include <csignal>
#include <memory>

#include "server/auth/keys_file.h"
#include "tests/e2e/certificates.h"
#include "tests/e2e/http_client.h"
#include "tests/e2e/service_fixture.h"
#include "tests/support/checkpoint_bytes.h"

namespace lorikeet {
namespace {

using ::testing::HasSubstr;

// An HTTP client that believes servers of `root` alone.
class TlsClient final : public HttpClient {
 public:
  TlsClient(int port, const Certificate& root, const Certificate* own = nullptr)
      : HttpClient(port), context_(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free) {
    X509_STORE_add_cert(SSL_CTX_get_cert_store(context_.get()), root.x509.get());
    SSL_CTX_set_verify(context_.get(), SSL_VERIFY_PEER, nullptr);
    if (own != nullptr) {
      SSL_CTX_use_certificate(context_.get(), own->x509.get());
      SSL_CTX_use_PrivateKey(context_.get(), own->pkey.get());
    }
    ssl_.reset(SSL_new(context_.get()), &SSL_free);
    SSL_set1_host(ssl_.get(), "localhost");
    SSL_set_fd(ssl_.get(), fd());
    connected_ = SSL_connect(ssl_.get()) == 1;
  }
  bool connected() const { return connected_; }

 private:
  ssize_t ReadSome(char* bytes, size_t size) override {
    return connected_ ? SSL_read(ssl_.get(), bytes, static_cast<int>(size)) : -1;
  }
  ssize_t WriteSome(const char* bytes, size_t size) override {
    return connected_ ? SSL_write(ssl_.get(), bytes, static_cast<int>(size)) : -1;
  }

  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_;
  std::shared_ptr<SSL> ssl_;
  bool connected_ = false;
};

class TlsTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServiceTest::SetUp();
    std::signal(SIGPIPE, SIG_IGN);  // OpenSSL's sockets raise it
    WriteServer(server_);
    config_.tls.certificate = (dir_.path() / "server.pem").string();
    config_.tls.key = (dir_.path() / "server.key").string();
  }
  void WriteServer(const Certificate& certificate) {
    dir_.Write("server.pem", certificate.Pem());
    dir_.Write("server.key", certificate.KeyPem());
  }
  void AskClients(const Certificate& root) {
    config_.tls.client_ca = dir_.Write("clients.pem", root.Pem()).string();
  }
  // The status of GET /v1/models; 0: no answer.
  int Get(const Certificate& root, const Certificate* own = nullptr) {
    return TlsClient(service_->http_port(), root, own).Get("/v1/models").status;
  }
  std::shared_ptr<grpc::Channel> Channel(const Certificate& root,
                                         const Certificate* own = nullptr) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = root.Pem();
    if (own != nullptr) options.pem_cert_chain = own->Pem();
    if (own != nullptr) options.pem_private_key = own->KeyPem();
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    return grpc::CreateCustomChannel(absl::StrCat("localhost:", service_->grpc_port()),
                                     grpc::SslCredentials(options), arguments);
  }
  grpc::StatusCode Generate(const std::shared_ptr<grpc::Channel>& channel) {
    grpc::ClientContext context;
    v1::GenerateResponse response;
    return v1::GenerationService::NewStub(channel)
        ->GenerateUnary(&context, TextRequest("hello", 1), &response)
        .error_code();
  }

  testing::TempDir dir_;
  const Certificate root_ = MakeCertificate("root", nullptr);
  const Certificate other_root_ = MakeCertificate("other root", nullptr);
  const Certificate server_ = MakeCertificate("server", &root_, "DNS:localhost,IP:127.0.0.1");
  const Certificate bot_ = MakeCertificate("bot", &root_);
};

TEST_F(TlsTest, OnlyWhoKnowsTheRootIsServed) {
  Start();
  EXPECT_EQ(Get(root_), 200);
  EXPECT_EQ(Get(other_root_), 0);
  EXPECT_EQ(Generate(Channel(root_)), grpc::StatusCode::OK);
  EXPECT_EQ(Generate(Channel(other_root_)), grpc::StatusCode::UNAVAILABLE);
  // Plain text gets no answer on either port.
  EXPECT_EQ(HttpClient(service_->http_port()).Get("/health").status, 0);
  v1::GenerateResponse response;
  EXPECT_EQ(Unary(TextRequest("hello", 1), &response).error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, AStreamIsWhole) {
  Start();
  TlsClient client(service_->http_port(), root_);
  for (int i = 0; i < 3; ++i) {  // on one connection
    const HttpResult answer = client.Post(
        "/v1/completions",
        R"({"model": "llama", "prompt": "hi", "max_tokens": 50, "stream": true, "seed": 1})");
    EXPECT_EQ(answer.status, 200);
    ASSERT_FALSE(answer.events().empty());
    EXPECT_EQ(answer.events().back(), "[DONE]");
  }
}

TEST_F(TlsTest, ClientsNeedACertificateOfTheRoot) {
  AskClients(root_);
  Start();
  const Certificate stranger = MakeCertificate("bot", &other_root_);
  EXPECT_EQ(Get(root_, &bot_), 200);
  EXPECT_EQ(Get(root_), 0);
  EXPECT_EQ(Get(root_, &stranger), 0);
  EXPECT_EQ(Generate(Channel(root_, &bot_)), grpc::StatusCode::OK);
  EXPECT_EQ(Generate(Channel(root_)), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Generate(Channel(root_, &stranger)), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, ACertificateIsAnIdentity) {
  AskClients(root_);
  const std::string key = MakeKey("admin");
  config_.keys = dir_.Write("keys", absl::StrCat(
      "- {id: bot, certificate: bot, roles: [generate]}\n"
      "- {id: pod, certificate: \"spiffe://here/pod\", roles: [metrics]}\n"
      "- {id: admin, sha256: ", HashKey(key), ", roles: [metrics]}\n")).string();
  Start();
  const Certificate pod = MakeCertificate("x", &root_, "URI:spiffe://here/pod");
  const Certificate nobody = MakeCertificate("nobody", &root_);
  EXPECT_EQ(Get(root_, &bot_), 200);
  EXPECT_EQ(Get(root_, &pod), 200);
  EXPECT_EQ(Get(root_, &nobody), 401);
  EXPECT_EQ(Generate(Channel(root_, &bot_)), grpc::StatusCode::OK);
  EXPECT_EQ(Generate(Channel(root_, &pod)), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(Generate(Channel(root_, &nobody)), grpc::StatusCode::UNAUTHENTICATED);
  TlsClient client(service_->http_port(), root_, &bot_);
  EXPECT_EQ(client.Get("/metrics").status, 403);
  client.set_headers("Authorization: Bearer " + key + "\r\n");  // a key counts before
  EXPECT_EQ(client.Get("/metrics").status, 200);
}

TEST_F(TlsTest, CertificatesThatChangeAreTakenWhileServing) {
  Start();
  Hold();
  grpc::ClientContext context;
  const auto old_channel = Channel(root_);
  const auto reader = v1::GenerationService::NewStub(old_channel)->Generate(
      &context, TextRequest("hello", 4));
  TlsClient old_client(service_->http_port(), root_);
  EXPECT_EQ(old_client.Get("/health").status, 200);
  dir_.Write("server.pem", "no certificate");  // what is wrong changes nothing
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  EXPECT_EQ(Get(root_), 200);
  WriteServer(MakeCertificate("server", &other_root_, "DNS:localhost"));
  WaitFor([&] { return Get(other_root_) == 200; });
  EXPECT_EQ(Get(root_), 0);
  Release();
  WaitFor([&] { return Generate(Channel(other_root_)) == grpc::StatusCode::OK; });
  EXPECT_EQ(Generate(Channel(root_)), grpc::StatusCode::UNAVAILABLE);
  // Connections from before go on.
  EXPECT_EQ(old_client.Get("/health").status, 200);
  v1::GenerateResponse message;
  while (reader->Read(&message)) continue;
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(TlsTest, AHandshakeThatDoesNotEndIsClosed) {
  config_.http_limits.handshake_s = 1;
  config_.http_limits.read_s = 3600;
  Start();
  HttpClient silent(service_->http_port()), begun(service_->http_port());
  begun.Send("\x16\x03\x01\x02");
  EXPECT_EQ(silent.Receive().status, 0);
  EXPECT_EQ(begun.Receive().status, 0);
  EXPECT_EQ(Get(root_), 200);
}

TEST_F(TlsTest, WrongFilesAreNamedAtStart) {
  dir_.Write("server.key", bot_.KeyPem());
  const auto service = Service::Open(config_);
  EXPECT_EQ(service.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(service.status().message()), HasSubstr("tls-key: '"));
  config_.tls.certificate = "/nowhere.pem";
  EXPECT_THAT(std::string(Service::Open(config_).status().message()),
              HasSubstr("tls-cert: '/nowhere.pem'"));
}

}  // namespace
}  // namespace lorikeet
