#include "tests/fuzz/seeds.h"

#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "engine/base/check.h"
#include "nlohmann/json.hpp"

namespace lorikeet::testing {
namespace {

namespace fs = std::filesystem;
const fs::path kGoldens = "tests/golden";

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  LK_CHECK_MSG(file.good(), path.string() + " cannot be read; run from the source tree's root");
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

class Collector {
 public:
  Seeds Collect() {
    for (const auto& entry : fs::recursive_directory_iterator(kGoldens)) {
      if (!entry.is_regular_file()) continue;
      const fs::path& path = entry.path();
      if (path.extension() == ".safetensors") Safetensors(path);
      if (path.extension() == ".gguf") Gguf(path);
      if (path.filename() == "adapter_config.json") Adapter(path.parent_path());
      if (path.filename() == "tokenizer_config.json") Add("text", path, 'f' + ReadFile(path));
    }
    Configs();
    Chats();
    seeds_["text"].emplace_back("tokens", "tAaBbCcDd\x01\x02\x03\xE4\xB8\x96");
    return std::move(seeds_);
  }

 private:
  void Add(const char* target, const fs::path& path, std::string input) {
    std::string name = path.lexically_relative(kGoldens).string();
    for (char& c : name) c = c == '/' ? '-' : c;
    seeds_[target].emplace_back(std::move(name), std::move(input));
  }

  void Safetensors(const fs::path& path) {
    const std::string name = path.string();
    const bool packed = name.find("nf4/") != name.npos || name.find("fp8/") != name.npos;
    Add(packed ? "checkpoint" : "safetensors", path, ReadFile(path));
  }

  void Gguf(const fs::path& path) {
    const std::string file = ReadFile(path);
    const bool tokenizer = path.string().find("/tokenizer/") != std::string::npos;
    Add(tokenizer ? "text" : "gguf", path, tokenizer ? 'g' + file : file);
  }

  void Adapter(const fs::path& directory) {
    for (const char* weights : {"adapter_model.safetensors", "adapter.safetensors"}) {
      if (!fs::exists(directory / weights)) continue;
      Add("adapter", directory,
          ReadFile(directory / "adapter_config.json") + '\0' + ReadFile(directory / weights));
    }
  }

  void Configs() {
    const auto all = nlohmann::ordered_json::parse(ReadFile(kGoldens / "configs/configs.json"));
    int number = 0;
    for (const auto& item : all) {
      seeds_["hf_config"].emplace_back(std::to_string(number++), item.at("config").dump());
    }
  }

  void Chats() {
    const auto all = nlohmann::ordered_json::parse(ReadFile(kGoldens / "tokenizer/chat.json"));
    int number = 0;
    for (const auto& chat : all.at("cases")) {
      const auto text = all.at("templates").find(chat.at("template"));
      if (text == all.at("templates").end()) continue;
      seeds_["text"].emplace_back(
          "chat" + std::to_string(number++),
          'c' + text->get<std::string>() + '\0' + chat.at("messages").dump());
    }
  }

  Seeds seeds_;
};

}  // namespace

Seeds GoldenSeeds() { return Collector().Collect(); }

}  // namespace lorikeet::testing
