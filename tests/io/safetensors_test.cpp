#include <ATen/ATen.h>
#include <graft/io/safetensors.h>

#include "tests/io/file_helpers.h"
#include "tests/support/testing.h"

using graft::io::SafetensorsFile;
using graft::io::write_safetensors;
using graft::testing::bytes_of;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::read_bytes;
using graft::testing::TempFolder;
using graft::testing::write_bytes;

namespace {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

const std::filesystem::path kGoldens = std::filesystem::path(GRAFT_GOLDENS) / "safetensors";
const char* const kOddName = "na\"me\\\n\x01\xc3\xa9";

/// The tensors of all_types.safetensors as tests/goldens/make_files.py builds them.
NamedTensors golden_tensors() {
  const std::vector<at::ScalarType> dtypes{at::kDouble,
                                           at::kFloat,
                                           at::kHalf,
                                           at::kBFloat16,
                                           at::kLong,
                                           at::kInt,
                                           at::kShort,
                                           at::kChar,
                                           at::kByte,
                                           at::kFloat8_e4m3fn,
                                           at::kFloat8_e4m3fnuz,
                                           at::kFloat8_e5m2,
                                           at::kFloat8_e5m2fnuz,
                                           at::kFloat8_e8m0fnu,
                                           at::kComplexFloat,
                                           at::kUInt64,
                                           at::kUInt32,
                                           at::kUInt16};
  NamedTensors tensors;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    const auto bytes = (at::arange(48) + static_cast<int64_t>(i)).to(at::kByte);
    const std::string name =
        std::string(1, "zyx"[i % 3]) + (i < 10 ? ".0" : ".") + std::to_string(i);
    tensors.emplace_back(name, bytes.view(dtypes[i]).reshape({2, -1}));
  }
  tensors.emplace_back("flags", at::tensor({1, 0, 1}).to(at::kBool));
  tensors.emplace_back("scalar", at::scalar_tensor(2.5));
  tensors.emplace_back("empty", at::empty({0, 3}));
  tensors.emplace_back(kOddName, at::ones({1}, at::kHalf));
  return tensors;
}

std::string bits(const at::Tensor& tensor) {
  const auto dense = tensor.contiguous();
  return {static_cast<const char*>(dense.const_data_ptr()), dense.nbytes()};
}

std::string file_bytes(const std::string& header, const std::string& data = "") {
  return bytes_of<uint64_t>(header.size()) + header + data;
}

/// The error for a file of these bytes.
std::string error_for(const std::string& bytes) {
  const TempFolder folder;
  write_bytes(folder / "bad.safetensors", bytes);
  const std::string error = error_of([&] { SafetensorsFile::open(folder / "bad.safetensors"); });
  INFO(error);
  REQUIRE(contains(error, "[safetensors] "));
  REQUIRE(contains(error, "bad.safetensors"));
  REQUIRE(error.find('\n') == std::string::npos);
  return error;
}

std::string header_error(const std::string& header, const std::string& data = "") {
  return error_for(file_bytes(header, data));
}

}  // namespace

TEST_CASE("safetensors files of the reference are read with every dtype", "[io][safetensors]") {
  const auto file = SafetensorsFile::open(kGoldens / "all_types.safetensors");
  const auto expected = golden_tensors();
  REQUIRE(file.names().size() == expected.size());
  REQUIRE(std::is_sorted(file.names().begin(), file.names().end()));
  for (const auto& [name, tensor] : expected) {
    INFO(name);
    REQUIRE(file.contains(name));
    const auto read = file.tensor(name);
    REQUIRE(read.scalar_type() == tensor.scalar_type());
    REQUIRE(read.sizes() == tensor.sizes());
    REQUIRE(bits(read) == bits(tensor));
    REQUIRE(file.info(name).dtype == tensor.scalar_type());
    REQUIRE(file.info(name).shape == tensor.sizes().vec());
    REQUIRE(file.info(name).bytes == tensor.nbytes());
  }
  REQUIRE(file.info("y.01").stored_type == "F32");
  REQUIRE(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  REQUIRE_FALSE(file.contains("absent"));
  REQUIRE(contains(error_of([&] { file.tensor("absent"); }), "got 'absent'"));
  REQUIRE(contains(error_of([&] { file.info("absent"); }), "all_types.safetensors"));
}

TEST_CASE("safetensors files are written byte for byte as the reference does",
          "[io][safetensors]") {
  const TempFolder folder;
  const auto check = [&](const char* golden, const NamedTensors& tensors,
                         const std::map<std::string, std::string>& metadata) {
    write_safetensors(folder / "out", tensors, metadata);
    INFO(golden);
    REQUIRE(read_bytes(folder / "out") == read_bytes(kGoldens / golden));
  };
  check("all_types.safetensors", golden_tensors(), {{"format", "pt"}});
  check("metadata.safetensors", {{"w", at::ones({1})}}, {{"k\"", "\xc3\xa9\t"}});
  check("plain.safetensors", {{"w", at::ones({2, 2})}}, {});
  check("empty.safetensors", {}, {});
}

TEST_CASE("safetensors writing gathers views and leaves autograd out", "[io][safetensors]") {
  const TempFolder folder;
  const auto base = at::arange(12, at::kFloat).reshape({3, 4});
  const auto complex = at::complex(base, base + 1);
  const auto learned = at::ones({2}).requires_grad_();
  write_safetensors(folder / "f", {{"t", base.t()}, {"c", complex.conj()}, {"g", learned}});
  const auto file = SafetensorsFile::open(folder / "f");
  REQUIRE(at::equal(file.tensor("t"), base.t()));
  REQUIRE(at::equal(file.tensor("c"), complex.conj().resolve_conj()));
  REQUIRE_FALSE(file.tensor("g").requires_grad());
}

TEST_CASE("safetensors writing refuses what the format cannot hold", "[io][safetensors]") {
  const TempFolder folder;
  const auto refused = [&](const NamedTensors& tensors,
                           const std::map<std::string, std::string>& metadata = {}) {
    return error_of([&] { write_safetensors(folder / "f", tensors, metadata); });
  };
  const auto one = at::ones({1});
  REQUIRE(contains(refused({{"a", one}, {"a", one}}), "got 'a' twice"));
  REQUIRE(contains(refused({{"__metadata__", one}}), "reserved"));
  REQUIRE(contains(refused({{"a\xff", one}}), "UTF-8; got 'a\\xff'"));
  REQUIRE(contains(refused({{"a\xed\xa0\x80", one}}), "UTF-8"));
  REQUIRE(contains(refused({{"a", one}}, {{"k", "\xc0\x80"}}), "metadata must be UTF-8"));
  REQUIRE(contains(refused({{"a", at::Tensor()}}), "undefined 'a'"));
  REQUIRE(contains(refused({{"a", one.to_sparse()}}), "another layout"));
  REQUIRE(contains(refused({{"a", one.to(at::kMeta)}}), "meta tensor"));
  REQUIRE(contains(refused({{"a", one.to(at::kComplexDouble)}}), "ComplexDouble"));
  REQUIRE(folder.list().empty());
}

TEST_CASE("safetensors tensors share the mapping, outlive the file and never change it",
          "[io][safetensors]") {
  const TempFolder folder;
  write_safetensors(folder / "f", {{"w", at::ones({4})}});
  const std::string before = read_bytes(folder / "f");
  at::Tensor first;
  at::Tensor second;
  {
    const auto file = SafetensorsFile::open(folder / "f");
    first = file.tensor("w");
    second = file.tensor("w");
  }
  first.fill_(7);
  REQUIRE(second[3].item<float>() == 7);
  REQUIRE(read_bytes(folder / "f") == before);
  write_safetensors(folder / "f", {{"w", at::zeros({4})}});
  REQUIRE(second[3].item<float>() == 7);
}

TEST_CASE("safetensors data at a misaligned place is copied", "[io][safetensors]") {
  const TempFolder folder;
  std::string header = R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  while (header.size() % 8 != 3) header += ' ';
  write_bytes(folder / "f", file_bytes(header, bytes_of(1.5f) + bytes_of(-2.0f)));
  const auto read = SafetensorsFile::open(folder / "f").tensor("w");
  REQUIRE(reinterpret_cast<uintptr_t>(read.const_data_ptr()) % alignof(float) == 0);
  REQUIRE(at::equal(read, at::tensor({1.5f, -2.0f})));
}

TEST_CASE("safetensors dtypes that LibTorch lacks are listed and refused by name",
          "[io][safetensors]") {
  const TempFolder folder;
  write_bytes(folder / "f",
              file_bytes(R"({"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}})", "ab"));
  const auto file = SafetensorsFile::open(folder / "f");
  REQUIRE(file.info("w").dtype == at::ScalarType::Undefined);
  REQUIRE(contains(error_of([&] { file.tensor("w"); }), "dtype F4 has no counterpart"));
  REQUIRE(contains(header_error(R"({"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", "ab"),
                   "whole bytes; got 12 bits"));
}

TEST_CASE("safetensors paths that are no readable file give one clear line", "[io][safetensors]") {
  const TempFolder folder;
  const auto error = [](const std::filesystem::path& path) {
    return error_of([&] { SafetensorsFile::open(path); });
  };
  REQUIRE(contains(error(folder / "absent"), "'No such file or directory'"));
  REQUIRE(contains(error(folder.path()), "got a folder"));
  REQUIRE(contains(error("/dev/null"), "got a device"));
  REQUIRE(contains(error_for(""), "got 0 bytes in all"));
  write_bytes(folder / "closed", "x");
  std::filesystem::permissions(folder / "closed", std::filesystem::perms::none);
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0755));
  // The superuser may read everything, so that one steps down for the question.
  const bool root = ::geteuid() == 0;
  if (root) REQUIRE(::seteuid(65534) == 0);
  std::string message;
  try {
    SafetensorsFile::open(folder / "closed");
  } catch (const graft::Error& caught) {
    message = caught.what();
  }
  if (root) REQUIRE(::seteuid(0) == 0);
  REQUIRE(contains(message, "'Permission denied'"));
}

TEST_CASE("safetensors headers are held to every rule", "[io][safetensors]") {
  REQUIRE(contains(error_for(bytes_of<uint64_t>(100'000'001)),
                   "at most 100000000 bytes; got 100000001"));
  REQUIRE(
      contains(error_for(bytes_of<uint64_t>(9) + "{}"), "got 9 bytes of header in a file of 10"));
  REQUIRE(contains(header_error("{"), "UTF-8 JSON"));
  REQUIRE(contains(header_error("{} x"), "UTF-8 JSON"));
  REQUIRE(contains(header_error(std::string("{}\0", 3)), "zero byte"));
  REQUIRE(contains(header_error("{\"\xff\":1}"), "UTF-8 JSON"));
  REQUIRE(contains(header_error("[]"), "got an array"));
  REQUIRE(contains(header_error("3"), "got 3"));
  REQUIRE(contains(header_error(std::string(1'000'000, '[')), "got an array"));
  REQUIRE(contains(header_error(R"({"a":null})"), "got null at key 'a'"));
  REQUIRE(contains(header_error(R"({"__metadata__":{"a":1}})"), "got 1 at key 'a'"));
  REQUIRE(contains(header_error(R"({"__metadata__":{"a":"1","a":"2"}})"), "got 'a' twice"));
  REQUIRE(contains(header_error(R"({"a":{"dtype":"F9","shape":[],"data_offsets":[0,0]}})"),
                   "got 'F9' for 'a'"));
  REQUIRE(
      contains(header_error(R"({"a":{"dtype":"F32","shape":[1]}})", "1234"), "got fewer for 'a'"));
  REQUIRE(contains(header_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", "1234"),
                   "got fewer"));
  REQUIRE(contains(header_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})"),
                   "got more"));
  REQUIRE(contains(header_error(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})"),
                   "got -1"));
  REQUIRE(contains(header_error(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})"),
                   "got '1.0'"));
  REQUIRE(
      contains(header_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":"y"}})"),
               "got 'x'"));
  std::string ones = "1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  REQUIRE(contains(
      header_error(R"({"a":{"dtype":"U8","shape":[)" + ones + R"(],"data_offsets":[0,1]}})", "1"),
      "at most 64 dimensions"));
}

TEST_CASE("safetensors data must be covered exactly", "[io][safetensors]") {
  const auto two = [](const char* a, const char* b) {
    return graft::concat(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)", a,
                         R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)", b, "}}");
  };
  REQUIRE(contains(header_error(two("[0,2]", "[3,5]"), "12345"),
                   "got offset 3 where 2 is due for 'b'"));
  REQUIRE(
      contains(header_error(two("[0,2]", "[1,3]"), "123"), "got offset 1 where 2 is due for 'b'"));
  REQUIRE(contains(header_error(two("[1,3]", "[3,5]"), "12345"),
                   "got offset 1 where 0 is due for 'a'"));
  REQUIRE(
      contains(header_error(two("[0,2]", "[2,4]"), "123"), "got an end at byte 4 of 3 for 'b'"));
  REQUIRE(contains(header_error(two("[0,2]", "[2,4]"), "12345"), "got 4 of 5 bytes"));
  REQUIRE(contains(header_error(two("[0,3]", "[3,5]"), "12345"), "got [0, 3] for 2 bytes of 'a'"));
  REQUIRE(contains(header_error(two("[2,0]", "[2,4]"), "1234"), "got [2, 0]"));
  REQUIRE(contains(header_error(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                "1"),
                   "got 'a' twice"));
  for (const char* shape :
       {"[4294967296,4294967296]", "[0,4294967296,4294967296]", "[9223372036854775808]"}) {
    REQUIRE(contains(header_error(graft::concat(R"({"a":{"dtype":"U8","shape":)", shape,
                                                R"(,"data_offsets":[0,0]}})")),
                     "fewer than 2^63 bits"));
  }
}

TEST_CASE("safetensors files that are cut or altered anywhere never crash", "[io][safetensors]") {
  const TempFolder folder;
  const std::string good = read_bytes(kGoldens / "metadata.safetensors");
  const auto reads = [&](const std::string& bytes) {
    write_bytes(folder / "f", bytes);
    try {
      const auto file = SafetensorsFile::open(folder / "f");
      for (const auto& name : file.names()) file.tensor(name).clone();
      return true;
    } catch (const graft::Error&) {
      return false;
    }
  };
  REQUIRE(reads(good));
  for (size_t length = 0; length < good.size(); ++length) {
    INFO("cut to " << length);
    REQUIRE_FALSE(reads(good.substr(0, length)));
  }
  int refused = 0;
  for (size_t i = 0; i < good.size(); ++i) {
    for (const int flip : {0x01, 0x04, 0x10, 0x80, 0xFF}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      refused += reads(bad) ? 0 : 1;
    }
  }
  REQUIRE(refused > 100);
}
