#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/init/initialiser.h>

#include <cmath>

#include "tests/support/testing.h"

namespace {

using graft::testing::contains;
using graft::testing::error_of;

struct Pair {
  at::Tensor A, B;
};

Pair filled(const std::string& name, uint64_t seed = 1, bool embedding = false) {
  Pair pair{at::ones({8, 100, 3}), at::ones({200, 8, 1})};
  const auto generator = at::detail::createCPUGenerator(seed);
  if (embedding)
    graft::init::initialise_embedding(name, {pair.A, pair.B}, generator);
  else
    graft::init::initialise(name, {pair.A, pair.B}, generator);
  return pair;
}

double largest(const at::Tensor& t) {
  return t.abs().max().item<double>();
}
double deviation(const at::Tensor& t) {
  return t.std().item<double>();
}

}  // namespace

TEST_CASE("kaiming fills A to 1/sqrt(in), kernel included, and leaves B zero", "[init]") {
  const Pair pair = filled("kaiming");
  const double bound = 1 / std::sqrt(300.0);
  CHECK(largest(pair.A) <= bound);
  CHECK(largest(pair.A) > 0.99 * bound);
  CHECK(std::abs(deviation(pair.A) - bound / std::sqrt(3.0)) < 0.03 * bound);
  CHECK(std::abs(pair.A.mean().item<double>()) < 0.05 * bound);
  CHECK(largest(pair.B) == 0);
}

TEST_CASE("gaussian fills A with deviation 1/r", "[init]") {
  const Pair pair = filled("gaussian");
  CHECK(std::abs(deviation(pair.A) - 1.0 / 8) < 0.01);
  CHECK(largest(pair.B) == 0);
}

TEST_CASE("orthogonal makes B A vanish although neither factor does", "[init]") {
  const Pair pair = filled("orthogonal");
  const at::Tensor A = pair.A.view({8, -1}), B = pair.B.view({200, 8});
  CHECK(largest(B.mm(A)) < 1e-7);
  CHECK(std::abs(deviation(A) - 0.1 / std::sqrt(2.0)) < 0.02);
  CHECK(std::abs(deviation(B) - 0.1 / std::sqrt(2.0)) < 0.02);
  at::Tensor odd_A = at::ones({3, 4}), odd_B = at::ones({5, 3});
  CHECK(contains(
      error_of([&] {
        graft::init::initialise("orthogonal", {odd_A, odd_B}, at::detail::createCPUGenerator(1));
      }),
      "[init] orthogonal needs an even rank; got 3"));
}

TEST_CASE("random fills both factors by their own inputs", "[init]") {
  const Pair pair = filled("random");
  CHECK(largest(pair.A) <= 1 / std::sqrt(300.0));
  CHECK(largest(pair.B) <= 1 / std::sqrt(8.0));
  CHECK(largest(pair.B) > 0.95 / std::sqrt(8.0));
}

TEST_CASE("an embedding starts with A zero and B standard normal", "[init]") {
  const Pair pair = filled("kaiming", 1, true), random = filled("random", 1, true);
  CHECK(largest(pair.A) == 0);
  CHECK(std::abs(deviation(pair.B) - 1) < 0.06);
  CHECK(std::abs(deviation(random.A) - 1) < 0.06);
}

TEST_CASE("values come from the generator alone", "[init]") {
  for (const std::string name : {"kaiming", "gaussian", "orthogonal", "random"}) {
    INFO(name);
    CHECK(at::equal(filled(name, 1).A, filled(name, 1).A));
    CHECK_FALSE(at::equal(filled(name, 1).A, filled(name, 2).A));
  }
}

TEST_CASE("an unknown initialiser lists the known ones", "[init]") {
  const std::string message =
      "[init] initialiser must be one of kaiming, gaussian, orthogonal, random, pissa, "
      "pissa_niter_N, olora, nystrom, lora_ga, corda, eva, svd, lora_sb; got 'pizza'";
  CHECK(error_of([] { filled("pizza"); }) == message);
  CHECK(error_of([] { filled("pizza", 1, true); }) == message);
  for (const std::string name : {"pissa_niter_", "pissa_niter_x", "pissa_niter_-1", ""})
    CHECK(contains(error_of([&] { graft::init::find_kind(name); }), "got '" + name + "'"));
}

TEST_CASE("names of initialisers are read in any spelling and say what they need", "[init]") {
  using graft::init::find_kind;
  using graft::init::Needs;
  CHECK(find_kind("LoRA-GA").name == "lora_ga");
  CHECK(find_kind("OLoRA").name == "olora");
  CHECK(find_kind("lora_ga").needs == Needs::gradient);
  CHECK(find_kind("lora_ga").subtracts);
  CHECK(find_kind("eva").needs == Needs::inputs);
  CHECK_FALSE(find_kind("eva").subtracts);
  CHECK(find_kind("pissa").is_reproducible());
  CHECK(find_kind("pissa_niter_16").iterations == 16);
  CHECK_FALSE(find_kind("pissa_niter_16").is_reproducible());
  CHECK_FALSE(find_kind("corda").is_reproducible());
  CHECK(find_kind("LoRA-SB").needs == Needs::gradient);
  CHECK_FALSE(find_kind("lora_sb").subtracts);
  CHECK((find_kind("lora_sb").has_core() && find_kind("svd").has_core()));
  CHECK_FALSE(find_kind("lora_ga").has_core());
}

TEST_CASE("what needs more than random numbers is refused where there are only those", "[init]") {
  CHECK(contains(error_of([] { filled("pissa"); }),
                 "this place takes kaiming, gaussian, orthogonal or random; got 'pissa'"));
}
