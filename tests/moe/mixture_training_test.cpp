// Balance losses and figures of mixtures on linear layers.
#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using graft::attach;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::for_each_method;
using graft::testing::GraftDecoder;
using graft::testing::MethodOf;
using graft::testing::randomise;
using graft::testing::some_tokens;

}  // namespace

TEST_CASE("the balance loss is a term of the step with its own gradient", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    options.balance_loss = 0.25;
    GraftDecoder model;
    model.to(at::kDouble);
    auto adapter = attach(model, options, {.targets = {"q_proj", "v_proj"}});
    randomise(adapter.parameters());
    CHECK(contains(error_of([&] { adapter.penalty(); }), "needs the graph of a training pass"));
    std::vector<Routing> routings;
    const auto run = [&] {
      const at::Tensor y = model.forward(some_tokens());
      routings.clear();
      for (const auto& layer : adapter.layers())
        routings.push_back(static_cast<Method&>(*layer.adapter).routing());
      return y;
    };
    run();
    CHECK(routings.size() == 4);
    const at::Tensor penalty = adapter.penalty();
    CHECK(distance(penalty, 0.25 * Method::balance(routings, options)) < 1e-15);
    const auto figures = adapter.figures();
    CHECK(figures[0].first == "balance_loss");
    CHECK(std::abs(figures[0].second * 0.25 - penalty.item<double>()) < 1e-12);
    graft::testing::NamedTensors routers;
    for (const auto& [name, tensor] : adapter.named_parameters())
      if (graft::testing::contains(name, "layers.0.q_proj.adapters.default.router"))
        routers.emplace_back(name, tensor);
    REQUIRE_FALSE(routers.empty());
    graft::testing::check_leaf_gradients(
        [&] {
          run();  // differences are taken without a graph, which penalty would refuse
          return at::GradMode::is_enabled() ? adapter.penalty()
                                            : 0.25 * Method::balance(routings, options);
        },
        routers);
    {
      const at::NoGradGuard no_grad;  // as a checkpointed block's first pass
      run();
    }
    CHECK(contains(error_of([&] { adapter.penalty(); }), "which a checkpointed block does not"));
    run();
    adapter.end_step({});
    CHECK(contains(error_of([&] { adapter.penalty(); }), "(layer 'model.layers.0.q_proj')"));
    CHECK(adapter.figures()[0].second == figures[0].second);
    model.eval();
    run();
    for (const Routing& routing : routings) CHECK_FALSE(routing.logits.requires_grad());
  });
}

TEST_CASE("without a coefficient no graph is kept and nothing is added", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    options.balance_loss = 0.0;
    GraftDecoder model;
    auto adapter = attach(model, options, {.targets = {"q_proj"}});
    CHECK(adapter.figures().empty());
    model.forward(some_tokens());
    CHECK_FALSE(adapter.penalty().defined());
    const Routing& routing = static_cast<Method&>(*adapter.layers()[0].adapter).routing();
    for (const at::Tensor& tensor :
         {routing.logits, routing.probabilities, routing.weights, routing.threshold})
      CHECK_FALSE((tensor.defined() && tensor.requires_grad()));
    CHECK(adapter.figures().size() >= 3);
  });
}

TEST_CASE("the shares of experts are the extremes over experts and layers", "[moe][mixture]") {
  Routing even = route({.experts = 2, .top_k = 2}, at::zeros({4, 2}));
  Routing one = route({.experts = 2, .top_k = 1}, at::tensor({5.0, 0.0, 5.0, 0.0}).view({2, 2}));
  const at::Tensor loss = at::scalar_tensor(3.0);
  auto figures = mixture_figures({even}, loss);
  CHECK(figures == graft::adapters::Figures{{"balance_loss", 3.0},
                                            {"smallest_expert_share", 0.5},
                                            {"largest_expert_share", 0.5}});
  const Routing padding =
      route({.experts = 2, .top_k = 1}, at::zeros({2, 2}), {.valid = at::zeros({2}, at::kBool)});
  CHECK(mixture_figures({padding, even}, loss) == figures);
  CHECK(mixture_figures({padding}, loss)[1].second == 0.0);
  figures = mixture_figures({even, one}, loss);
  CHECK(figures[1].second == 0.0);
  CHECK(figures[2].second == 1.0);
}
