#include <graft/core/error.h>
#include <graft/io/mapped_file.h>
#include <graft/io/safetensors.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "format_text.h"

namespace graft::io {
namespace {

namespace fs = std::filesystem;

constexpr const char* kArea = "checkpoint";
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr size_t kLargestIndex = 100'000'000;

/// Shard file -> the tensors that the index promises in it.
using Shards = std::map<std::string, std::set<std::string>>;

/// Parses the index; a tensor that is listed twice and deep nesting are refused where they appear.
nlohmann::json parse_index(std::string_view text, const std::string& place) {
  constexpr int kDeepest = 8;
  std::string section;
  std::set<std::string> listed;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    GRAFT_CHECK(depth <= kDeepest, kArea, "the index must be a flat JSON object; got more than ",
                kDeepest, " levels (", place, ")");
    if (event != nlohmann::json::parse_event_t::key) return true;
    const auto& key = value.get_ref<const std::string&>();
    if (depth == 1) section = key;
    if (depth == 1 || (depth == 2 && section == "weight_map")) {
      GRAFT_CHECK(listed.insert((depth == 1 ? "/" : ".") + key).second, kArea,
                  "the index must list every name once; got ", quote(key), " twice (", place, ")");
    }
    return true;
  };
  try {
    GRAFT_CHECK(text.find('\0') == std::string_view::npos, kArea,
                "the index must be UTF-8 JSON; got a zero byte (", place, ")");
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::parse_error& error) {
    fail(kArea, concat("the index must be UTF-8 JSON; got an error at its byte ", error.byte, " (",
                       place, ")"));
  }
}

/// A shard is a file beside the index: its name must not lead elsewhere.
void check_shard_name(const std::string& shard, const std::string& place) {
  const bool plain = !shard.empty() && shard != "." && shard != ".." &&
                     shard.find('/') == std::string::npos && shard.find('\0') == std::string::npos;
  GRAFT_CHECK(plain, kArea, "a shard must be a plain file name within the folder; got ",
              quote(shard), " (", place, ")");
}

Shards read_index(const fs::path& path) {
  const std::string place = quote(path.string());
  const auto file = MappedFile::open(path, kArea);
  GRAFT_CHECK(file->size() <= kLargestIndex, kArea, "the index must have at most ", kLargestIndex,
              " bytes; got ", file->size(), " (", place, ")");
  const std::string_view text(reinterpret_cast<const char*>(file->data()), file->size());
  const nlohmann::json index = parse_index(text, place);
  GRAFT_CHECK(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(),
              kArea, "the index must have an object weight_map; got none (", place, ")");
  Shards shards;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    GRAFT_CHECK(shard.is_string(), kArea, "weight_map must map names to file names; got ",
                shard.type_name(), " for ", quote(name), " (", place, ")");
    check_shard_name(shard.get_ref<const std::string&>(), place);
    shards[shard.get<std::string>()].insert(name);
  }
  return shards;
}

void check_shards_exist(const fs::path& folder, const Shards& shards) {
  std::vector<std::string> missing;
  for (const auto& [shard, names] : shards) {
    std::error_code error;
    if (!fs::exists(folder / shard, error)) missing.push_back(shard);
  }
  GRAFT_CHECK(missing.empty(), kArea, "every shard of the index must exist; missing ",
              quote_list(missing), " (", quote(folder.string()), ")");
}

/// "name (shard)" for each of `names` that `keep` accepts.
template <class Names, class Keep>
void collect(const Names& names, const std::string& shard, const Keep& keep,
             std::vector<std::string>& out) {
  for (const std::string& name : names) {
    if (keep(name)) out.push_back(name + " in " + shard);
  }
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& folder_or_file) {
  const std::string place = quote(folder_or_file.string());
  std::error_code error;
  if (fs::is_directory(folder_or_file, error)) {
    const fs::path single = folder_or_file / kSingleFile;
    if (fs::exists(single, error)) return open(single);
    const fs::path index = folder_or_file / kIndexFile;
    GRAFT_CHECK(fs::exists(index, error), kArea, "a folder must hold ", kSingleFile, " or ",
                kIndexFile, "; got neither (", place, ")");
    return open_index(index);
  }
  if (folder_or_file.filename().string().ends_with(".index.json")) {
    return open_index(folder_or_file);
  }
  Checkpoint checkpoint;
  checkpoint.path_ = folder_or_file;
  checkpoint.add(SafetensorsFile::open(folder_or_file));
  return checkpoint;
}

Checkpoint Checkpoint::open_index(const fs::path& index) {
  const Shards shards = read_index(index);
  const fs::path folder = index.parent_path();
  check_shards_exist(folder, shards);

  Checkpoint checkpoint;
  checkpoint.path_ = index;
  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
  for (const auto& [shard, promised] : shards) {
    const SafetensorsFile file = SafetensorsFile::open(folder / shard);
    collect(
        promised, shard, [&](const auto& name) { return !file.contains(name); }, missing);
    collect(
        file.names(), shard, [&](const auto& name) { return !promised.contains(name); },
        unexpected);
    checkpoint.add(file);
  }
  GRAFT_CHECK(missing.empty() && unexpected.empty(), kArea,
              "shards must hold exactly what the index lists; missing: ",
              missing.empty() ? "none" : quote_list(missing),
              "; unexpected: ", unexpected.empty() ? "none" : quote_list(unexpected), " (",
              quote(index.string()), ")");
  return checkpoint;
}

void Checkpoint::add(const SafetensorsFile& file) {
  for (const std::string& name : file.names()) file_index_.emplace(name, files_.size());
  files_.push_back(file);
  names_.clear();
  for (const auto& [name, position] : file_index_) names_.push_back(name);
}

const SafetensorsFile& Checkpoint::file_of(const std::string& name) const {
  const auto found = file_index_.find(name);
  GRAFT_CHECK(found != file_index_.end(), kArea, "no tensor of that name; got ", quote(name), " (",
              quote(path_.string()), ")");
  return files_[found->second];
}

bool Checkpoint::contains(const std::string& name) const {
  return file_index_.contains(name);
}

const TensorInfo& Checkpoint::info(const std::string& name) const {
  return file_of(name).info(name);
}

at::Tensor Checkpoint::tensor(const std::string& name) const {
  return file_of(name).tensor(name);
}

}  // namespace graft::io
