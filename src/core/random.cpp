#include <graft/core/error.h>
#include <graft/core/random.h>

namespace graft::random {

// Recorders and players that are open on this thread, innermost first.
struct KeyTape::Mode {
  KeyTape* tape;
  bool playing;
  Mode* outer;
};

namespace {
thread_local KeyTape::Mode* innermost = nullptr;
}  // namespace

uint64_t hash_name(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

KeyTape::Recorder::Recorder(KeyTape& tape) : mode_(new Mode{&tape, false, innermost}) {
  innermost = mode_;
}

KeyTape::Recorder::~Recorder() {
  innermost = mode_->outer;
  delete mode_;
}

KeyTape::Player::Player(KeyTape& tape)
    : mode_(new Mode{&tape, true, innermost}), previous_position_(tape.position_) {
  tape.position_ = 0;
  innermost = mode_;
}

KeyTape::Player::~Player() {
  mode_->tape->position_ = previous_position_;
  innermost = mode_->outer;
  delete mode_;
}

// A recorder passes the question on and notes the answer: inside a playback it notes the keys that
// are played.
MaskKey KeyTape::draw(Mode* mode, uint64_t seed, uint32_t site, uint32_t& counter) {
  if (mode == nullptr) return {seed, site, counter++};
  KeyTape& tape = *mode->tape;
  if (!mode->playing) {
    tape.keys_.push_back(draw(mode->outer, seed, site, counter));
    return tape.keys_.back();
  }
  GRAFT_CHECK(tape.position_ < tape.keys_.size() && tape.keys_[tape.position_].site == site &&
                  tape.keys_[tape.position_].seed == seed,
              "random", "a recomputed piece must draw the same masks as the first time; draw ",
              tape.position_, " of ", tape.keys_.size(), " differs");
  return tape.keys_[tape.position_++];
}

MaskKey draw_key(uint64_t seed, uint32_t site, uint32_t& counter) {
  return KeyTape::draw(innermost, seed, site, counter);
}

bool is_playing_back() {
  for (const KeyTape::Mode* mode = innermost; mode != nullptr; mode = mode->outer)
    if (mode->playing) return true;
  return false;
}

}  // namespace graft::random
