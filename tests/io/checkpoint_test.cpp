#include <ATen/ATen.h>
#include <graft/io/atomic_file.h>
#include <graft/io/safetensors.h>

#include "tests/io/file_helpers.h"
#include "tests/support/testing.h"

using graft::io::Checkpoint;
using graft::io::write_safetensors;
using graft::io::write_text_file;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::TempFolder;

namespace {

/// The error for this index beside two shards: one.safetensors holds a and b, two.safetensors holds
/// c.
std::string index_error(const std::string& index) {
  const TempFolder folder;
  write_safetensors(folder / "one.safetensors", {{"a", at::ones({1})}, {"b", at::ones({2})}});
  write_safetensors(folder / "two.safetensors", {{"c", at::ones({3})}});
  write_text_file(folder / "model.safetensors.index.json", index);
  const std::string error = error_of([&] { Checkpoint::open(folder.path()); });
  INFO(error);
  REQUIRE(contains(error, "[checkpoint] "));
  REQUIRE(contains(error, folder.path().string()));
  REQUIRE(error.find('\n') == std::string::npos);
  return error;
}

}  // namespace

TEST_CASE("a checkpoint is a file, a folder with one file, or an index with shards",
          "[io][checkpoint]") {
  const TempFolder folder;
  write_safetensors(folder / "one.safetensors", {{"b", at::ones({2})}});
  write_safetensors(folder / "two.safetensors", {{"a", at::zeros({3})}});
  const auto index = folder / "model.safetensors.index.json";
  write_text_file(index, R"({"metadata":{"total_size":20},)"
                         R"("weight_map":{"b":"one.safetensors","a":"two.safetensors"}})");
  for (const auto& path : {folder.path(), index}) {
    const auto checkpoint = Checkpoint::open(path);
    REQUIRE(checkpoint.names() == std::vector<std::string>{"a", "b"});
    REQUIRE(checkpoint.contains("b"));
    REQUIRE_FALSE(checkpoint.contains("c"));
    REQUIRE(checkpoint.info("a").shape == std::vector<int64_t>{3});
    REQUIRE(at::equal(checkpoint.tensor("b"), at::ones({2})));
    REQUIRE(checkpoint.files().size() == 2);
    REQUIRE(contains(error_of([&] { checkpoint.tensor("c"); }), "got 'c'"));
  }
  REQUIRE(Checkpoint::open(folder / "one.safetensors").names() == std::vector<std::string>{"b"});

  write_safetensors(folder / "model.safetensors", {{"whole", at::ones({1})}});
  REQUIRE(Checkpoint::open(folder.path()).names() == std::vector<std::string>{"whole"});
}

TEST_CASE("a checkpoint without weights says what was looked for", "[io][checkpoint]") {
  const TempFolder folder;
  REQUIRE(contains(error_of([&] { Checkpoint::open(folder.path()); }),
                   "model.safetensors or model.safetensors.index.json; got neither"));
  REQUIRE(contains(error_of([&] { Checkpoint::open(folder / "absent"); }), "No such file"));
  REQUIRE(contains(error_of([&] { Checkpoint::open(folder / "x.index.json"); }), "No such file"));
}

TEST_CASE("an index and its shards must agree, and every difference is listed",
          "[io][checkpoint]") {
  REQUIRE(contains(index_error(R"({"weight_map":{"a":"x","b":"y","c":"two.safetensors"}})"),
                   "missing 'x', 'y'"));
  const std::string both = index_error(
      R"({"weight_map":{"a":"one.safetensors","c":"one.safetensors","d":"two.safetensors"}})");
  REQUIRE(contains(both, "missing: 'c in one.safetensors', 'd in two.safetensors'"));
  REQUIRE(contains(both, "unexpected: 'b in one.safetensors', 'c in two.safetensors'"));
}

TEST_CASE("an index cannot lead out of its folder", "[io][checkpoint]") {
  for (const char* shard :
       {"../one.safetensors", "/etc/hostname", "sub/one.safetensors", "..", ".", ""}) {
    INFO(shard);
    REQUIRE(contains(index_error(std::string(R"({"weight_map":{"a":")") + shard + "\"}}"),
                     "plain file name within the folder"));
  }
}

TEST_CASE("an index is held to its form", "[io][checkpoint]") {
  REQUIRE(contains(index_error("{"), "UTF-8 JSON"));
  REQUIRE(contains(index_error(""), "UTF-8 JSON"));
  REQUIRE(contains(index_error(std::string("{}\0", 3)), "zero byte"));
  REQUIRE(contains(index_error("[]"), "an object weight_map"));
  REQUIRE(contains(index_error("{}"), "an object weight_map"));
  REQUIRE(contains(index_error(R"({"weight_map":[]})"), "an object weight_map"));
  REQUIRE(contains(index_error(R"({"weight_map":{"a":3}})"), "got number for 'a'"));
  REQUIRE(contains(index_error(R"({"weight_map":{"a":"x","a":"y"}})"), "got 'a' twice"));
  REQUIRE(contains(index_error(R"({"weight_map":{},"weight_map":{}})"), "got 'weight_map' twice"));
  REQUIRE(contains(index_error(std::string(100'000, '[')), "more than 8 levels"));
}
