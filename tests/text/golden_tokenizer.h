/// The tokenizers under tests/goldens/tokenizers and what the reference gives for them.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace graft::testing {

inline std::string tokenizer_path(const std::string& name) {
  return std::string(GRAFT_GOLDENS) + "/tokenizers/" + name;
}

inline nlohmann::ordered_json read_golden(const std::string& name) {
  std::ifstream file(tokenizer_path(name));
  return nlohmann::ordered_json::parse(file);
}

inline const char* const kStyles[] = {"gpt2",  "llama3", "qwen",    "smollm",    "behaviors",
                                      "added", "llama",  "mistral", "metaspace", "unknown"};

}  // namespace graft::testing
