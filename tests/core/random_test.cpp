#include <graft/core/philox.h>
#include <graft/core/random.h>

#include <thread>

#include "tests/support/testing.h"

namespace {

using graft::Philox4;
using graft::philox4x32;
using graft::random::draw_key;
using graft::random::hash_name;
using graft::random::KeyTape;
using graft::random::MaskKey;
using graft::testing::contains;
using graft::testing::error_of;

constexpr uint32_t kOnes = 0xffffffff;
constexpr Philox4 kPi = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
constexpr uint64_t kPiKey = 0x299f31d0a4093822;

constexpr bool equal(Philox4 a, Philox4 b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

}  // namespace

// The known answers that come with Random123, the authors' library.
TEST_CASE("philox4x32 with 10 rounds gives the known answers of Random123", "[core][random]") {
  CHECK(equal(philox4x32<10>({0, 0, 0, 0}, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(equal(philox4x32<10>({kOnes, kOnes, kOnes, kOnes}, ~uint64_t{0}),
              {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(equal(philox4x32<10>(kPi, kPiKey), {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST_CASE("philox4x32 with 7 rounds gives the known answers of Random123", "[core][random]") {
  CHECK(equal(philox4x32<7>({0, 0, 0, 0}, 0), {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}));
  CHECK(equal(philox4x32<7>({kOnes, kOnes, kOnes, kOnes}, ~uint64_t{0}),
              {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}));
  CHECK(equal(philox4x32(kPi, kPiKey), {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}));
  static_assert(equal(philox4x32(kPi, kPiKey), philox4x32<7>(kPi, kPiKey)));
}

TEST_CASE("a layer's name is hashed by FNV-1a", "[core][random]") {
  CHECK(hash_name("") == 0xcbf29ce484222325);
  CHECK(hash_name("a") == 0xaf63dc4c8601ec8c);
  CHECK(hash_name("foobar") == 0x85944171f73967e8);
}

TEST_CASE("drawn keys count up per layer", "[core][random]") {
  uint32_t counter = 5;
  CHECK(draw_key(1, 2, counter) == MaskKey{1, 2, 5});
  CHECK(draw_key(1, 2, counter) == MaskKey{1, 2, 6});
  CHECK(counter == 7);
}

TEST_CASE("a tape plays back the recorded keys and advances no counter", "[core][random]") {
  uint32_t first = 3, second = 10;
  KeyTape tape;
  {
    const KeyTape::Recorder recorder(tape);
    draw_key(9, 1, first);
    draw_key(9, 2, second);
  }
  CHECK((first == 4 && second == 11));
  for (int replay = 0; replay < 2; ++replay) {
    const KeyTape::Player player(tape);
    CHECK(draw_key(9, 1, first) == MaskKey{9, 1, 3});
    CHECK(draw_key(9, 2, second) == MaskKey{9, 2, 10});
  }
  CHECK((first == 4 && second == 11));
  CHECK(draw_key(9, 1, first) == MaskKey{9, 1, 4});
}

TEST_CASE("a playback refuses other draws than the recorded ones", "[core][random]") {
  uint32_t counter = 0;
  KeyTape tape;
  {
    const KeyTape::Recorder recorder(tape);
    draw_key(9, 1, counter);
  }
  const KeyTape::Player player(tape);
  CHECK(contains(error_of([&] { draw_key(9, 2, counter); }), "draw 0 of 1 differs"));
  CHECK(contains(error_of([&] { draw_key(8, 1, counter); }), "[random]"));
  draw_key(9, 1, counter);
  CHECK(contains(error_of([&] { draw_key(9, 1, counter); }), "draw 1 of 1 differs"));
}

TEST_CASE("tapes nest: an inner recording sees the keys that the outer one plays",
          "[core][random]") {
  uint32_t counter = 0, inner_counter = 100;
  KeyTape outer, first, second;
  {
    const KeyTape::Recorder recorder(outer);
    draw_key(1, 1, counter);
    {
      const KeyTape::Recorder nested(first);
      draw_key(1, 2, inner_counter);
    }
    draw_key(1, 1, counter);
  }
  const KeyTape::Player player(outer);
  CHECK(draw_key(1, 1, counter).step == 0);
  {
    const KeyTape::Recorder nested(second);
    CHECK(draw_key(1, 2, inner_counter).step == 100);
  }
  CHECK(draw_key(1, 1, counter).step == 1);
  for (KeyTape* tape : {&first, &second}) {
    const KeyTape::Player again(*tape);
    CHECK(draw_key(1, 2, inner_counter).step == 100);
  }
  CHECK(counter == 2);
  CHECK(inner_counter == 101);
}

TEST_CASE("a tape is the recording thread's alone", "[core][random]") {
  KeyTape tape;
  const KeyTape::Recorder recorder(tape);
  uint32_t here = 0, there = 0;
  std::thread([&] { draw_key(1, 7, there); }).join();
  draw_key(1, 1, here);
  const KeyTape::Player player(tape);
  CHECK(draw_key(1, 1, here) == MaskKey{1, 1, 0});
  CHECK(there == 1);
}
