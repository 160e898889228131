#include <ATen/ATen.h>
#include <graft/io/gguf.h>
#include <graft/io/safetensors.h>

#include <cstring>

#include "tests/io/file_helpers.h"
#include "tests/support/testing.h"

using graft::io::GgufFile;
using graft::io::SafetensorsFile;
using graft::testing::bytes_of;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::read_bytes;
using graft::testing::TempFolder;
using graft::testing::write_bytes;

namespace {

const std::filesystem::path kGoldens = std::filesystem::path(GRAFT_GOLDENS) / "gguf";

/// Numbers of GGUF's value types and tensor types, as the files hold them.
enum : uint32_t { kUint8 = 0, kUint32 = 4, kBool = 7, kString = 8, kArray = 9 };
enum : uint32_t { kF32 = 0, kQ4_1 = 3 };

std::string text(const std::string& value) {
  return bytes_of<uint64_t>(value.size()) + value;
}

template <class T>
std::string key(const std::string& name, uint32_t type, T value) {
  return text(name) + bytes_of(type) + bytes_of(value);
}

std::string tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                   uint64_t offset) {
  std::string out = text(name) + bytes_of(static_cast<uint32_t>(dims.size()));
  for (const uint64_t size : dims) out += bytes_of(size);
  return out + bytes_of(type) + bytes_of(offset);
}

/// A file of these parts; `data` bytes follow the padding to 32.
std::string gguf(const std::vector<std::string>& values, const std::vector<std::string>& tensors,
                 size_t data = 0, uint32_t version = 3) {
  std::string out = "GGUF" + bytes_of(version) + bytes_of<uint64_t>(tensors.size()) +
                    bytes_of<uint64_t>(values.size());
  for (const auto& part : values) out += part;
  for (const auto& part : tensors) out += part;
  while (out.size() % 32 != 0) out += '\0';
  return out + std::string(data, '\1');
}

GgufFile open_bytes(const TempFolder& folder, const std::string& bytes) {
  write_bytes(folder / "f.gguf", bytes);
  return GgufFile::open(folder / "f.gguf");
}

/// The error for a file of these bytes.
std::string error_for(const std::string& bytes) {
  const TempFolder folder;
  const std::string error = error_of([&] { open_bytes(folder, bytes); });
  INFO(error);
  REQUIRE(contains(error, "[gguf] "));
  REQUIRE(contains(error, "f.gguf"));
  REQUIRE(error.find('\n') == std::string::npos);
  return error;
}

/// Elements whose bits differ; two values that are no numbers count as equal.
int64_t differing(const at::Tensor& a, const at::Tensor& b) {
  const auto both_nan = at::isnan(a).logical_and(at::isnan(b));
  return a.view(at::kInt)
      .ne(b.view(at::kInt))
      .logical_and(both_nan.logical_not())
      .sum()
      .item<int64_t>();
}

}  // namespace

TEST_CASE("quantised types expand to the reference's bits, at extreme scales too", "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "all_types.gguf");
  const auto expected = SafetensorsFile::open(kGoldens / "all_types.safetensors");
  for (const char* name :
       {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}) {
    INFO(name);
    const auto want = expected.tensor(name);
    const auto got = file.tensor(name);
    REQUIRE(got.scalar_type() == at::kFloat);
    REQUIRE(got.sizes() == want.sizes());
    REQUIRE(differing(got, want) == 0);
    REQUIRE(file.info(name).stored_type == name);
    REQUIRE(file.info(name).shape == want.sizes().vec());
    REQUIRE(file.info(name).dtype == at::kFloat);
  }
}

TEST_CASE("types that ATen has are read in their own dtype, dimensions reversed", "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "all_types.gguf");
  const auto expected = SafetensorsFile::open(kGoldens / "all_types.safetensors");
  for (const char* name :
       {"float64", "float32", "float16", "int8", "int16", "int32", "int64", "bfloat16"}) {
    INFO(name);
    const auto got = file.tensor(name);
    REQUIRE(got.scalar_type() == expected.info(name).dtype);
    REQUIRE(at::equal(got, expected.tensor(name)));
  }
  REQUIRE(file.info("float32").shape == std::vector<int64_t>{2, 3, 2});
  REQUIRE(file.info("float32").bytes == 48);
  REQUIRE(file.contains("Q4_0"));
  REQUIRE_FALSE(file.contains("absent"));
  REQUIRE(file.names().front() == "Q4_0");
  REQUIRE(contains(error_of([&] { file.tensor("absent"); }), "got 'absent'"));
}

TEST_CASE("dense gguf tensors share the mapping and outlive the file", "[io][gguf]") {
  at::Tensor first;
  at::Tensor second;
  {
    const auto file = GgufFile::open(kGoldens / "tiny.gguf");
    first = file.tensor("f");
    second = file.tensor("f");
  }
  first.fill_(7);
  REQUIRE(second[2].item<float>() == 7);
  REQUIRE(GgufFile::open(kGoldens / "tiny.gguf").tensor("f")[2].item<float>() == 2);
}

TEST_CASE("gguf metadata of every type is read", "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "all_types.gguf");
  REQUIRE(file.get_string("general.architecture") == "test");
  REQUIRE(file.get_string("text") ==
          "gr\xc3\xbc\xc3\x9f"
          "e");
  REQUIRE(file.get_uint("u8") == 200);
  REQUIRE(file.get_int("i8") == -100);
  REQUIRE(file.get_uint("u16") == 60000);
  REQUIRE(file.get_int("i16") == -30000);
  REQUIRE(file.get_uint("u32") == 4000000000);
  REQUIRE(file.get_int("u32") == 4000000000);
  REQUIRE(file.get_int("i32") == -2000000000);
  REQUIRE(file.get_uint("u64") == 18000000000000000000u);
  REQUIRE(file.get_int("i64") == -9000000000000000000);
  REQUIRE(file.get_float("f32") == static_cast<double>(0.1f));
  REQUIRE(file.get_float("f64") == 0.1);
  REQUIRE(file.get_bool("yes"));
  REQUIRE_FALSE(file.get_bool("no"));
  REQUIRE(file.get_string_array("strings") == std::vector<std::string>{"a", "", "\xc3\xa9"});
  REQUIRE(file.get_float_array("floats") == std::vector<double>{0.5, -2.0});
  REQUIRE(file.get_float_array("f64s") == std::vector<double>{0.1});
  REQUIRE(file.get_int_array("ints") == std::vector<int64_t>{3, -4});
  REQUIRE(file.get_int_array("u8s") == std::vector<int64_t>{0, 255});
  REQUIRE(file.get_int_array("i64s") == std::vector<int64_t>{-5, int64_t{1} << 62});
  REQUIRE(file.get_int_array("bools") == std::vector<int64_t>{1, 0});
  REQUIRE(file.keys().front() == "general.architecture");
  REQUIRE(file.keys().size() == 22);
  REQUIRE(file.has_key("text"));
}

TEST_CASE("gguf getters refuse other types, missing keys and numbers that do not fit",
          "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "all_types.gguf");
  REQUIRE(contains(error_of([&] { file.get_string("absent"); }), "got 'absent'"));
  REQUIRE(
      contains(error_of([&] { file.get_string("u8"); }), "key 'u8' must hold a string; got uint8"));
  REQUIRE(contains(error_of([&] { file.get_string("strings"); }), "got an array of string"));
  REQUIRE(contains(error_of([&] { file.get_uint("f32"); }), "an integer; got float32"));
  REQUIRE(contains(error_of([&] { file.get_int("yes"); }), "an integer; got bool"));
  REQUIRE(contains(error_of([&] { file.get_float("u8"); }), "a float; got uint8"));
  REQUIRE(contains(error_of([&] { file.get_bool("u8"); }), "a bool; got uint8"));
  REQUIRE(contains(error_of([&] { file.get_string_array("text"); }),
                   "an array of strings; got string"));
  REQUIRE(
      contains(error_of([&] { file.get_float_array("ints"); }), "floats; got an array of int32"));
  REQUIRE(contains(error_of([&] { file.get_int_array("floats"); }),
                   "integers; got an array of float32"));
  REQUIRE(contains(error_of([&] { file.get_uint("i8"); }), "got -100"));
  REQUIRE(contains(error_of([&] { file.get_int("u64"); }), "got 18000000000000000000"));
  REQUIRE(contains(error_of([&] { file.get_int_array("u64s"); }), "got 18446744073709551615"));
}

TEST_CASE("gguf find_ forms return nothing for a missing key and still check the type",
          "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "all_types.gguf");
  REQUIRE(file.find_string("text") == file.get_string("text"));
  REQUIRE(file.find_uint("u8") == 200u);
  REQUIRE(file.find_int("i8") == -100);
  REQUIRE(file.find_float("f64") == 0.1);
  REQUIRE(file.find_bool("no") == false);
  REQUIRE(file.find_string_array("strings")->size() == 3);
  REQUIRE(file.find_float_array("floats")->size() == 2);
  REQUIRE(file.find_int_array("ints")->size() == 2);
  REQUIRE_FALSE(file.find_string("absent"));
  REQUIRE_FALSE(file.find_uint("absent"));
  REQUIRE_FALSE(file.find_int("absent"));
  REQUIRE_FALSE(file.find_float("absent"));
  REQUIRE_FALSE(file.find_bool("absent"));
  REQUIRE_FALSE(file.find_string_array("absent"));
  REQUIRE_FALSE(file.find_float_array("absent"));
  REQUIRE_FALSE(file.find_int_array("absent"));
  REQUIRE(contains(error_of([&] { file.find_uint("text"); }), "got string"));
}

TEST_CASE("gguf tensor types that cannot be read are refused by name or number", "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "all_types.gguf");
  REQUIRE(file.info("IQ2_XXS").dtype == at::ScalarType::Undefined);
  REQUIRE(contains(error_of([&] { file.tensor("IQ2_XXS"); }), "type IQ2_XXS cannot be read"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {32}, 4, 0)}, 32)), "got number 4 for 'a'"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {32}, 99, 0)}, 32)), "got number 99 for 'a'"));
}

TEST_CASE("gguf versions 2 and 3 are read, others refused", "[io][gguf]") {
  const TempFolder folder;
  for (const uint32_t version : {2, 3}) {
    const auto file = open_bytes(
        folder, gguf({key<uint8_t>("k", kUint8, 5)}, {tensor("a", {2}, kF32, 0)}, 8, version));
    REQUIRE(file.get_uint("k") == 5);
    REQUIRE(file.tensor("a").numel() == 2);
  }
  REQUIRE(contains(error_for(gguf({}, {}, 0, 1)), "2 or 3; got 1"));
  REQUIRE(contains(error_for(gguf({}, {}, 0, 4)), "2 or 3; got 4"));
  REQUIRE(contains(error_for(gguf({}, {}, 0, 0x03000000)), "a big-endian file"));
  REQUIRE(contains(error_for("GGML" + gguf({}, {}).substr(4)), "the letters GGUF"));
  REQUIRE(contains(error_for(""), "where 0 bytes are left"));
}

TEST_CASE("gguf scalars and empty tensors are fine", "[io][gguf]") {
  const TempFolder folder;
  const auto file =
      open_bytes(folder, gguf({}, {tensor("s", {}, kF32, 0), tensor("e", {0, 3}, kF32, 0)}, 4));
  REQUIRE(file.tensor("s").dim() == 0);
  REQUIRE(file.tensor("e").sizes() == at::IntArrayRef{3, 0});
}

TEST_CASE("gguf counts beyond the file are refused before anything is allocated", "[io][gguf]") {
  constexpr uint64_t kHuge = uint64_t{1} << 60;
  const std::string start = "GGUF" + bytes_of<uint32_t>(3);
  REQUIRE(contains(error_for(start + bytes_of(kHuge) + bytes_of<uint64_t>(0)),
                   "all of its tensor entries"));
  REQUIRE(contains(error_for(start + bytes_of<uint64_t>(0) + bytes_of(kHuge)),
                   "all of its metadata values"));
  const auto array = [](uint32_t type, uint64_t count) {
    return gguf({text("k") + bytes_of<uint32_t>(kArray) + bytes_of(type) + bytes_of(count)}, {},
                64);
  };
  for (const uint32_t type : {kUint8, kString}) {
    REQUIRE(contains(error_for(array(type, kHuge)), "got 1152921504606846976 where"));
    REQUIRE(contains(error_for(array(type, ~uint64_t{0})), "got 18446744073709551615 where"));
  }
  // 2^62 elements of 4 bytes: the product wraps around to zero.
  REQUIRE(contains(error_for(array(kUint32, uint64_t{1} << 62)), "got 4611686018427387904 where"));
  REQUIRE(
      contains(error_for(gguf({key<uint64_t>("k", kString, kHuge)}, {}, 64)), "metadata values"));
  REQUIRE(contains(error_for(gguf({bytes_of(kHuge) + std::string(40, 'k')}, {})), "metadata keys"));
}

TEST_CASE("gguf metadata is held to its form", "[io][gguf]") {
  const auto one = key<uint8_t>("k", kUint8, 5);
  REQUIRE(contains(error_for(gguf({one, one}, {})), "got 'k' twice"));
  REQUIRE(
      contains(error_for(gguf({key<uint64_t>("k", 13, 0)}, {})), "below 13; got 13 for key 'k'"));
  REQUIRE(contains(error_for(gguf({key<uint8_t>("k", kBool, 2)}, {})), "0 or 1; got 2"));
  REQUIRE(
      contains(error_for(gguf({key<uint32_t>("k", kArray, kArray)}, {}, 64)), "arrays of arrays"));
  REQUIRE(contains(error_for(gguf({key<uint32_t>("a\nb", kBool, 2)}, {})), "'a\\x0ab'"));
}

TEST_CASE("gguf tensors are held to their form and place", "[io][gguf]") {
  const auto a = tensor("a", {8}, kF32, 0);
  REQUIRE(contains(error_for(gguf({}, {a, a}, 32)), "got 'a' twice"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {1, 1, 1, 1, 1}, kF32, 0)}, 32)),
                   "at most 4 dimensions; got 5"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {16, 2}, kQ4_1, 0)}, 64)),
                   "multiple of 32; got 16"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {8}, kF32, 4)}, 64)), "multiple of 32; got 4"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {9}, kF32, 0)}, 32)), "got 36 bytes at 0"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {8}, kF32, 64)}, 64)), "got 32 bytes at 64"));
  REQUIRE(contains(error_for(gguf({}, {tensor("a", {1}, kF32, ~uint64_t{31})}, 64)),
                   "within the file"));
  REQUIRE(
      contains(error_for(gguf({}, {tensor("a", {16}, kF32, 0), tensor("b", {8}, kF32, 32)}, 64)),
               "overlap; got 'a' and 'b'"));
  for (const auto& dims :
       {std::vector<uint64_t>{1u << 31, 1u << 31}, {0, ~uint64_t{0}}, {uint64_t{1} << 62}}) {
    REQUIRE(contains(error_for(gguf({}, {tensor("a", dims, kF32, 0)}, 32)),
                     "fewer than 2^60 elements"));
  }
}

TEST_CASE("gguf alignment comes from the file and must be a power of two", "[io][gguf]") {
  const auto file = GgufFile::open(kGoldens / "aligned.gguf");
  REQUIRE(at::equal(file.tensor("a"), at::arange(3, at::kFloat)));
  REQUIRE(at::equal(file.tensor("b"), at::arange(4, at::kFloat)));
  const auto error = [](const std::string& value) { return error_for(gguf({value}, {}, 64)); };
  REQUIRE(contains(error(key<uint32_t>("general.alignment", kUint32, 0)), "power of two; got 0"));
  REQUIRE(contains(error(key<uint32_t>("general.alignment", kUint32, 48)), "power of two; got 48"));
  REQUIRE(contains(error(key<uint8_t>("general.alignment", kUint8, 32)), "a uint32; got uint8"));

  // Alignment 1 puts a float at an odd place: it is copied.
  const TempFolder folder;
  const auto align = key<uint32_t>("general.alignment", kUint32, 1);
  std::string bytes = gguf({align}, {tensor("a", {1}, kF32, 1)});
  const size_t data = 24 + align.size() + tensor("a", {1}, kF32, 1).size();
  bytes.resize(data);
  const auto odd = open_bytes(folder, bytes + "x" + bytes_of(2.5f)).tensor("a");
  REQUIRE(odd.item<float>() == 2.5f);
}

TEST_CASE("gguf files that are cut or altered anywhere never crash", "[io][gguf]") {
  const TempFolder folder;
  const std::string good = read_bytes(kGoldens / "tiny.gguf");
  const auto reads = [&](const std::string& bytes) {
    try {
      const auto file = open_bytes(folder, bytes);
      for (const auto& name : file.names()) file.tensor(name).clone();
      if (file.has_key("names")) file.get_string_array("names");
      return true;
    } catch (const graft::Error&) {
      return false;
    }
  };
  REQUIRE(reads(good));
  // The last tensor, 40 bytes, is followed by padding that may be missing.
  const size_t needed = (good.size() - 1) / 32 * 32 - 32 + 40;
  for (size_t length = 0; length < good.size(); ++length) {
    INFO("cut to " << length << " of " << needed);
    REQUIRE(reads(good.substr(0, length)) == (length >= needed));
  }
  int refused = 0;
  for (size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      refused += reads(bad) ? 0 : 1;
    }
  }
  REQUIRE(refused > 500);
}
