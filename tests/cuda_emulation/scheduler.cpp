#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "fiber_switch.h"
#include "memory.h"

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024, kWarp = 32;

enum class State { ready, barrier, collective, done };

struct Thread {
  Fiber fiber;
  State state = State::done;
  unsigned index[3] = {};
  Place place;
  // The collective it waits in.
  const char* what = nullptr;
  unsigned mask = 0;
  void* argument = nullptr;
  Copies* copies = nullptr;
};

std::vector<Thread> threads;  // of a block; the stacks are kept from launch to launch
unsigned count = 0;           // threads of the running block
unsigned running = kMaxThreads;
unsigned warp_intervals[kMaxThreads / kWarp];
unsigned interval = 0;
uint32_t block_number = 0, first_block = 0;
unsigned block_index[3];
int order = 0;
std::mt19937 random_bits;
const Launch* launch = nullptr;
std::string fault;
Fiber scheduler_fiber;

void thread_main() {
  launch->body(launch->body_context);
  threads[running].state = State::done;
  for (;;) switch_fiber(threads[running].fiber, scheduler_fiber);
}

void sleep_now() {
  switch_fiber(threads[running].fiber, scheduler_fiber);
}

void resume(unsigned i) {
  Thread& thread = threads[i];
  running = i;
  launch->publish(launch->publish_context, {{thread.index[0], thread.index[1], thread.index[2]},
                                            {block_index[0], block_index[1], block_index[2]}});
  switch_fiber(scheduler_fiber, thread.fiber);
  running = kMaxThreads;
  if (std::string report = sanitizer_report(); fault.empty()) fault = std::move(report);
  if (!fault.empty()) throw Fault(fault);
}

// The numbers 0 .. n-1 in the current order.
std::vector<unsigned> ordered(unsigned n) {
  std::vector<unsigned> list(n);
  std::iota(list.begin(), list.end(), 0u);
  if (order == 1) std::reverse(list.begin(), list.end());
  if (order >= 2) std::shuffle(list.begin(), list.end(), random_bits);
  return list;
}

bool run_warp(unsigned warp) {
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
      if (threads[i].state != State::ready) continue;
      resume(i);
      ran = again = true;
    }
  }
  return ran;
}

// One pass over the threads; says whether any could run.
bool pass() {
  bool ran = false;
  if (order < 4) {
    for (const unsigned i : ordered(count)) {
      if (threads[i].state != State::ready) continue;
      resume(i);
      ran = true;
    }
    return ran;
  }
  for (const unsigned warp : ordered(count / kWarp)) ran = run_warp(warp) || ran;
  return ran;
}

std::string waiting_list() {
  std::string text;
  for (unsigned i = 0, listed = 0; i < count && listed < 4; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == State::done) continue;
    text += "; thread " + std::to_string(i) + " waits at " +
            (thread.state == State::barrier ? "__syncthreads" : thread.what) + " of " +
            describe(thread.place);
    ++listed;
  }
  return text;
}

// When no thread can run: true if the block is over, otherwise the barrier opens.
bool settle() {
  unsigned done = 0, waiting = 0;
  bool same = true;
  const Thread* first = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    const Thread& thread = threads[i];
    done += thread.state == State::done;
    if (thread.state != State::barrier) continue;
    if (first == nullptr) first = &thread;
    same = same && thread.place.line() == first->place.line() &&
           std::strcmp(thread.place.file_name(), first->place.file_name()) == 0;
    ++waiting;
  }
  if (done == count) return true;
  if (waiting != count || !same)
    throw Fault("a block cannot go on: " + std::to_string(done) + " of " + std::to_string(count) +
                " threads have ended" + waiting_list());
  for (unsigned i = 0; i < count; ++i) threads[i].state = State::ready;
  ++interval;
  return false;
}

void prepare_threads() {
  if (threads.empty()) threads.resize(kMaxThreads);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index[0] = i % launch->block[0];
    thread.index[1] = i / launch->block[0] % launch->block[1];
    thread.index[2] = i / launch->block[0] / launch->block[1];
    thread.state = State::ready;
    if (thread.copies == nullptr) thread.copies = make_copies();
    reset_copies(thread.copies);
    start_fiber(thread.fiber, thread_main);
  }
  std::fill(std::begin(warp_intervals), std::end(warp_intervals), 0u);
  interval = 0;
}

void run_block(unsigned index) {
  block_index[0] = index % launch->grid[0];
  block_index[1] = index / launch->grid[0] % launch->grid[1];
  block_index[2] = index / launch->grid[0] / launch->grid[1];
  ++block_number;
  begin_block(launch->shared_bytes);
  prepare_threads();
  while (pass() || !settle()) {
  }
  check_guards();
}

}  // namespace

void set_order(int new_order) {
  order = new_order;
}

bool copies_arrive_late() {
  return order % 2 == 1;
}

void run(const Launch& new_launch) {
  launch = &new_launch;
  count = new_launch.block[0] * new_launch.block[1] * new_launch.block[2];
  const unsigned blocks = new_launch.grid[0] * new_launch.grid[1] * new_launch.grid[2];
  if (count == 0 || count > kMaxThreads || count % kWarp != 0)
    throw Fault("a block must be 1 to 32 whole warps; got " + std::to_string(count) + " threads");
  if (blocks == 0) throw Fault("a grid must not be empty");
  if (new_launch.grid[1] > 65535 || new_launch.grid[2] > 65535)
    throw Fault("a grid's second and third dimension must be at most 65535");
  random_bits.seed(static_cast<unsigned>(order));
  fault.clear();
  first_block = block_number + 1;
  for (const unsigned block : ordered(blocks)) run_block(block);
}

bool in_kernel() {
  return running < kMaxThreads;
}

Position position() {
  return {block_number, first_block, running, interval, warp_intervals[running / kWarp]};
}

std::string describe(const Place& place) {
  std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string describe_thread() {
  const auto triple = [](const unsigned* v) {
    return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) +
           ")";
  };
  return "block " + triple(block_index) + ", thread " + triple(threads[running].index);
}

void fail(const std::string& message) {
  fault = message + " [" + describe_thread() + "]";
  for (;;) sleep_now();
}

void barrier(const Place& place) {
  threads[running].state = State::barrier;
  threads[running].place = place;
  sleep_now();
}

void collective(const char* what, unsigned mask, void* argument, void (*done)(void**, unsigned),
                const Place& place) {
  Thread& self = threads[running];
  const unsigned warp = running / kWarp * kWarp, lane = running % kWarp;
  const auto refuse = [&](const char* why) {
    fail(std::string(what) + " of " + describe(place) + ": " + why);
  };
  if ((mask >> lane & 1) == 0) refuse("a lane is not in its own mask");
  self.what = what;
  self.mask = mask;
  self.argument = argument;
  self.place = place;
  self.state = State::collective;
  bool all_here = true;
  void* lanes[kWarp] = {};
  for (unsigned i = 0; i < kWarp; ++i) {
    const Thread& other = threads[warp + i];
    const bool wanted = (mask >> i & 1) != 0;
    if (other.state == State::collective) {
      if (wanted ? other.mask != mask : (other.mask & mask) != 0)
        refuse("masks overlap and differ");
      if (wanted && std::strcmp(other.what, what) != 0)
        refuse("lanes of one mask are at different instructions");
    } else if (wanted) {
      if (other.state == State::done) refuse("a lane of the mask has ended");
      all_here = false;
    }
    if (wanted) lanes[i] = other.argument;
  }
  if (!all_here) return sleep_now();
  done(lanes, mask);
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) != 0) threads[warp + i].state = State::ready;
  }
}

void sync_warp(unsigned mask, const Place& place) {
  static unsigned* counter;
  counter = mask == 0xffffffffu ? &warp_intervals[running / kWarp] : nullptr;
  collective(
      "__syncwarp", mask, nullptr,
      [](void**, unsigned) {
        if (counter != nullptr) ++*counter;
      },
      place);
}

Copies& copies() {
  return *threads[running].copies;
}

}  // namespace emulation
