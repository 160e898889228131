#include <graft/core/error.h>
#include <graft/core/random.h>

namespace graft::random {
namespace {
thread_local KeyTape* active_tape = nullptr;
thread_local bool playing = false;
}  // namespace

uint64_t hash_name(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

KeyTape::Recorder::Recorder(KeyTape& tape) : previous_(active_tape), previous_playing_(playing) {
  active_tape = &tape;
  playing = false;
}

KeyTape::Recorder::~Recorder() {
  active_tape = previous_;
  playing = previous_playing_;
}

KeyTape::Player::Player(KeyTape& tape)
    : previous_(active_tape),
      previous_playing_(playing),
      previous_position_(tape.position_),
      tape_(tape) {
  active_tape = &tape;
  playing = true;
  tape.position_ = 0;
}

KeyTape::Player::~Player() {
  active_tape = previous_;
  playing = previous_playing_;
  tape_.position_ = previous_position_;
}

MaskKey draw_key(uint64_t seed, uint32_t site, uint32_t& counter) {
  if (active_tape == nullptr) return {seed, site, counter++};
  if (!playing) {
    active_tape->keys_.push_back({seed, site, counter++});
    return active_tape->keys_.back();
  }
  KeyTape& tape = *active_tape;
  GRAFT_CHECK(tape.position_ < tape.keys_.size() && tape.keys_[tape.position_].site == site &&
                  tape.keys_[tape.position_].seed == seed,
              "random", "a recomputed piece must draw the same masks as the first time; draw ",
              tape.position_, " of ", tape.keys_.size(), " differs");
  return tape.keys_[tape.position_++];
}

}  // namespace graft::random
