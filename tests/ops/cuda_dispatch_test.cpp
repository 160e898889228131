// The table that sends operations on a device to kernels or to LibTorch, and how answers are
// counted.
#include "src/ops/cuda_dispatch.h"

#include <ATen/ATen.h>
#include <graft/ops/device_paths.h>

#include "tests/support/testing.h"

namespace {

using namespace graft::ops;

constexpr DeviceAbility kHopper{true, 90};
const DeviceCase kLora{
    .op = DeviceOp::lora_linear, .type = at::kBFloat16, .rows = 4096, .columns = 4096, .rank = 16};

DeviceCase with(DeviceCase call, const std::function<void(DeviceCase&)>& change) {
  change(call);
  return call;
}

}  // namespace

TEST_CASE("dispatch: what kernels take", "[ops][cuda]") {
  for (const auto type : {at::kBFloat16, at::kHalf, at::kFloat}) {
    for (const int64_t rank : {1, 8, 9, 64}) {
      for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{4097}, (int64_t{1} << 31) - 1}) {
        const DeviceCase call{
            .op = DeviceOp::lora_linear, .type = type, .rows = rows, .columns = 13, .rank = rank};
        CHECK(fallback_reason(call, kHopper).empty());
        CHECK(fallback_reason(call, {true, 80}).empty());
      }
    }
  }
  for (int op = 0; op < kDeviceOps; ++op) {
    const DeviceCase call{
        .op = static_cast<DeviceOp>(op), .type = at::kFloat, .rows = 5, .columns = 7, .rank = 3};
    INFO(device_op_name(call.op));
    CHECK(fallback_reason(call, kHopper) == (call.op == DeviceOp::sparse ? "no kernel" : ""));
    CHECK_FALSE(device_op_name(call.op).empty());
  }
}

TEST_CASE("dispatch: why LibTorch computes the rest", "[ops][cuda]") {
  CHECK(fallback_reason(kLora, {false, 0}) == "built without kernels");
  CHECK(fallback_reason(kLora, {true, 75}) == "compute capability below 8.0");
  CHECK(fallback_reason(with(kLora, [](auto& c) { c.type = at::kDouble; }), kHopper) ==
        "numbers other than bf16, fp16, fp32");
  CHECK(fallback_reason(with(kLora, [](auto& c) { c.rank = 65; }), kHopper) ==
        "rank not in [1, 64]");
  CHECK(fallback_reason(with(kLora, [](auto& c) { c.rank = 0; }), kHopper) ==
        "rank not in [1, 64]");
  CHECK(fallback_reason(with(kLora, [](auto& c) { c.one_type = false; }), kHopper) ==
        "operands of different types");
  CHECK(fallback_reason(with(kLora, [](auto& c) { c.rows = int64_t{1} << 31; }), kHopper) ==
        "2^31 rows or columns");
  CHECK(
      fallback_reason({.op = DeviceOp::dora_linear, .type = at::kFloat, .rank = 4, .plain = false},
                      kHopper) == "dropout on the base");
  CHECK(fallback_reason({.op = DeviceOp::cross_entropy, .type = at::kFloat, .plain = false},
                        kHopper) == "strided elements");
  CHECK(fallback_reason({.op = DeviceOp::experts, .type = at::kFloat, .rank = 65}, kHopper) ==
        "rank not in [1, 64]");
  CHECK(fallback_reason({.op = DeviceOp::experts, .type = at::kFloat, .rank = 4, .plain = false},
                        kHopper) == "more than 256 experts");
  CHECK(fallback_reason({.op = DeviceOp::router, .type = at::kFloat, .plain = false}, kHopper) ==
        "another selection than the top 8 of 256");
  CHECK(fallback_reason({.op = DeviceOp::adamw, .type = at::kBFloat16}, kHopper) ==
        "numbers other than fp32");
  CHECK(fallback_reason({.op = DeviceOp::grad_norm, .type = at::kHalf}, kHopper) ==
        "numbers other than fp32");
  // A rank means nothing to the others.
  CHECK(fallback_reason({.op = DeviceOp::swiglu, .type = at::kHalf, .rank = 99}, kHopper).empty());
}

TEST_CASE("dispatch: answers are counted by operation and reason", "[ops][cuda]") {
  reset_device_paths();
  CHECK(device_paths().empty());
  CHECK(describe_device_paths().empty());
  // No kernels serve the CPU: every call for it falls back, with the reason.
  for (int i = 0; i < 3; ++i)
    CHECK(kernels_for({.op = DeviceOp::swiglu, .type = at::kFloat}, at::kCPU) == nullptr);
  CHECK(kernels_for(kLora, at::kCPU) == nullptr);
  const auto paths = device_paths();
  REQUIRE(paths.size() == 2);
  CHECK(paths[0].operation == "lora_linear");
  CHECK(paths[1].operation == "swiglu");
  CHECK(paths[1].count == 3);
  CHECK(describe_device_paths() ==
        "lora_linear: 1 by LibTorch: built without kernels\n"
        "swiglu: 3 by LibTorch: built without kernels\n");
  reset_device_paths();
  CHECK(device_paths().empty());
}

TEST_CASE("dispatch: CPU tensors stay on the CPU; one device a call", "[ops][cuda]") {
  CHECK_FALSE(on_device(at::ones({2})));
  check_one_device("lora", {at::ones({1}), at::Tensor(), at::ones({1})});
  CHECK(graft::testing::error_of([] {
          check_one_device("lora", {at::ones({1}), at::empty({1}, at::kMeta)});
        }) == "[lora] all tensors must be on one device; got cpu and meta");
}
