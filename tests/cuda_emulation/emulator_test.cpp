// The emulator itself: instructions do what the PTX manual says, and faults are found.
#include <numeric>
#include <string>

#include "faulty_kernels.h"
#include "lora_reference.h"

namespace {
using namespace graft::cuda::testing;

// What running a case under every order showed.
struct Outcome {
  std::string fault;
  bool bits_differ = false, poison = false;
};

Outcome outcome_of(const faulty::Case& one) {
  Outcome outcome;
  std::vector<int> first;
  for (int order = 0; order < emulation::kOrders; ++order) {
    emulation::set_order(order);
    std::vector<int> values(256);
    std::iota(values.begin(), values.end(), 0);
    DeviceArray<int> data(values);
    try {
      one.run(data.data());
      const std::vector<int> got = data.get();
      if (order == 0) first = got;
      outcome.bits_differ = outcome.bits_differ || got != first;
      for (const int v : got) outcome.poison = outcome.poison || v == -1;
    } catch (const emulation::Fault& fault) {
      if (outcome.fault.empty()) outcome.fault = fault.what();
    }
  }
  emulation::set_order(0);
  return outcome;
}
}  // namespace

TEST_CASE("kernels without faults pass in every order", "[emulator]") {
  for (int order = 0; order < emulation::kOrders; ++order) {
    emulation::set_order(order);
    DeviceArray<int> data(std::vector<int>(256, 3));
    CHECK_NOTHROW(faulty::run_correct(data.data()));
  }
  emulation::set_order(0);
}

TEST_CASE("planted faults are found", "[emulator]") {
  for (int i = 0; i < faulty::kCaseCount; ++i) {
    const faulty::Case& one = faulty::kCases[i];
    const Outcome outcome = outcome_of(one);
    INFO(one.name << ": " << outcome.fault);
    const bool checked = emulation::checker != nullptr,
               sanitized = emulation::has_address_sanitizer();
    const bool found =
        one.found_plainly || checked || (sanitized && one.found_by_address_sanitizer);
    CHECK(found == !outcome.fault.empty());
    if (found && (checked || (one.found_plainly && !sanitized)))
      CHECK(outcome.fault.find(one.message) != std::string::npos);
    if (!found) CHECK((outcome.bits_differ || outcome.poison) == one.wrong_bits_plainly);
  }
}

TEST_CASE("a fault names its place and thread", "[emulator]") {
  const Outcome outcome = outcome_of(faulty::kCases[5]);
  CHECK(outcome.fault.find("faulty_kernels.cpp:") != std::string::npos);
}

template <class T>
void check_tile_product(bool is_fp16) {
  const Matrix<T> a(16, 16, 1), b(16, 8, 2);
  DeviceArray<T> a_device(a.stored), b_device(b.stored);
  const std::vector<float> d = in_every_order([&] {
    DeviceArray<float> d_device(16 * 8);
    faulty::run_tile_product(a_device.data(), b_device.data(), d_device.data(), is_fp16);
    return d_device.get();
  });
  CHECK(relative_error(doubles(d), product(a, b).v) < 1e-6);
}

TEST_CASE("ldmatrix and mma multiply tiles", "[emulator]") {
  check_tile_product<bf16>(false);
  check_tile_product<fp16>(true);
}

TEST_CASE("shuffles and votes", "[emulator]") {
  const std::vector<int> out = in_every_order([] {
    DeviceArray<int> device(160);
    faulty::run_shuffles(device.data());
    return device.get();
  });
  for (int lane = 0; lane < 32; ++lane) {
    const auto at = [&](int kind) { return out[static_cast<size_t>(32 * kind + lane)]; };
    CHECK(at(0) == lane / 8 * 8 + 3);
    CHECK(at(1) == (lane ^ 5));
    CHECK(at(2) == (lane < 2 ? lane : lane - 2));
    CHECK(at(3) == (lane % 16 < 14 ? lane + 2 : lane));
    CHECK(at(4) == 0x49249249);
  }
}
