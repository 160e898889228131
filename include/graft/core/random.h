/// Keys of dropout masks: which mask a layer uses in which call, and how recomputation gets the
/// same one again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace graft::random {

/// Names one mask: the run's seed, the layer (`site`) and how often that layer has drawn a mask
/// before (`step`).
struct MaskKey {
  uint64_t seed = 0;
  uint32_t site = 0;
  uint32_t step = 0;
  bool operator==(const MaskKey&) const = default;
};

/// A stable number for a layer's name (FNV-1a), so that a mask does not depend on the order of
/// attaching.
uint64_t hash_name(std::string_view name);

/// The keys that a piece of the forward pass drew, in order. Gradient checkpointing records them
/// while it computes the piece for the first time and plays them back while it computes it again.
/// Tapes nest; which are
/// active is a property of the thread.
class KeyTape {
 public:
  struct Mode;

  /// While it lives, every key drawn on this thread is appended to the tape.
  class Recorder {
   public:
    explicit Recorder(KeyTape& tape);
    ~Recorder();
    Recorder(const Recorder&) = delete;
    Recorder& operator=(const Recorder&) = delete;

   private:
    Mode* mode_;
  };

  /// While it lives, draws on this thread return the tape's keys in order and advance no layer's
  /// counter.
  class Player {
   public:
    explicit Player(KeyTape& tape);
    ~Player();
    Player(const Player&) = delete;
    Player& operator=(const Player&) = delete;

   private:
    Mode* mode_;
    std::size_t previous_position_;
  };

 private:
  friend MaskKey draw_key(uint64_t seed, uint32_t site, uint32_t& counter);
  friend bool is_playing_back();
  static MaskKey draw(Mode* mode, uint64_t seed, uint32_t site, uint32_t& counter);

  std::vector<MaskKey> keys_;
  std::size_t position_ = 0;
};

/// The next key of a layer: (seed, site, counter) with the counter advanced, or the tape's next key
/// during a playback. Throws when a playback asks for more keys than were recorded or for another
/// layer's: the piece is not repeatable.
MaskKey draw_key(uint64_t seed, uint32_t site, uint32_t& counter);

/// Whether a piece that has run before runs again on this thread (KeyTape::Player): who counts
/// passes leaves it out.
bool is_playing_back();

}  // namespace graft::random
