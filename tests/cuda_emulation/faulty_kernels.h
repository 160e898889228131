/// Small kernels, each with one fault that the emulator must find; see faulty_kernels.cpp.
#pragma once

#include <driver_types.h>

namespace faulty {

/// A fault, who finds it, and words of the message.
struct Case {
  const char* name;
  cudaError_t (*run)(int* data);  ///< 256 initialised ints of device memory
  bool found_plainly;             ///< by every build, as a Fault
  bool found_by_address_sanitizer;
  const char* message;  ///< of the race checker, or of every build if found plainly
  /// Instead of a Fault the plain builds show bits that differ between orders or are poisonous.
  bool wrong_bits_plainly = false;
};
extern const Case kCases[];
extern const int kCaseCount;

/// The right form of the kernels in question.
cudaError_t run_correct(int* data);

/// Products of tiles, for the layouts of fragments: d [16, 8] = a [16, 16] b [16, 8], all row by
/// row.
cudaError_t run_tile_product(const void* a, const void* b, float* d, bool fp16);
/// out[32 * k + lane]: the four kinds of shuffles and a vote.
cudaError_t run_shuffles(int* out);

}  // namespace faulty
