#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/core/random.h>
#include <graft/nn/batch_rows.h>
#include <graft/train/checkpoint.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/custom_class.h>

#include <set>
#include <utility>

namespace graft::train {
namespace {

constexpr const char* kArea = "checkpoint";

using Region = std::function<at::Tensor(const at::Tensor&)>;

// What backward needs to run the region again; owned by the graph.
struct State : torch::CustomClassHolder {
  Region run;
  random::KeyTape keys;
  std::shared_ptr<const nn::BatchParts> parts;  // what the batch was made of, or null
};

// Throws when the recomputed graph ends in a leaf that is not among `inputs`: its gradient would be
// lost without a word. The walk stops at the inputs, so it does not leave the region.
void check_all_listed(const at::Tensor& y, const std::vector<at::Tensor>& inputs) {
  std::set<const torch::autograd::Node*> seen;
  for (const at::Tensor& input : inputs) {
    seen.insert(torch::autograd::impl::gradient_edge(input).function.get());
  }
  std::vector<torch::autograd::Node*> open = {y.grad_fn().get()};
  while (!open.empty()) {
    torch::autograd::Node* node = open.back();
    open.pop_back();
    if (node == nullptr || !seen.insert(node).second) continue;
    if (const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      fail(kArea,
           concat("every trainable tensor that the region uses must be listed; one of shape ",
                  leaf->variable.sizes(), " is not"));
    }
    for (const auto& edge : node->next_edges()) open.push_back(edge.function.get());
  }
}

// The region's output with its graph, and the leaf that stands for x.
std::pair<at::Tensor, at::Tensor> recompute(State& state, const at::Tensor& x,
                                            bool x_requires_grad) {
  const at::AutoGradMode with_graph(true);
  const nn::BatchRows parts(state.parts);
  random::KeyTape::Player play(state.keys);
  at::Tensor leaf = x.detach();
  leaf.set_requires_grad(x_requires_grad);
  return {state.run(leaf), leaf};
}

struct CheckpointFunction : torch::autograd::Function<CheckpointFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx,
                            const c10::intrusive_ptr<State>& state, const at::Tensor& x,
                            at::TensorList trainable) {
    at::Tensor y;
    {
      random::KeyTape::Recorder record(state->keys);
      y = state->run(x.detach());
    }
    GRAFT_CHECK(y.defined(), kArea, "the region must return a tensor; got an undefined one");
    torch::autograd::variable_list saved = {x};
    saved.insert(saved.end(), trainable.begin(), trainable.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["state"] = c10::IValue::make_capsule(state);
    ctx->saved_data["shape"] = y.sizes();
    ctx->saved_data["dtype"] = y.scalar_type();
    // A region that hands back its input or a parameter must not alias it.
    return y.is_alias_of(x) ? y.clone() : y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list gradients) {
    GRAFT_CHECK(!at::GradMode::is_enabled(), kArea,
                "a second derivative is not supported; got backward with create_graph");
    const auto saved = ctx->get_saved_variables();
    const auto state =
        c10::static_intrusive_pointer_cast<State>(ctx->saved_data["state"].toCapsule());
    const auto [y, leaf] = recompute(*state, saved[0], saved[0].requires_grad());
    GRAFT_CHECK(y.defined() && y.sizes() == ctx->saved_data["shape"].toIntVector() &&
                    y.scalar_type() == ctx->saved_data["dtype"].toScalarType(),
                kArea, "the region must compute the same again; its output became ",
                y.defined() ? concat(y.scalar_type(), y.sizes()) : "undefined");

    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < saved.size(); ++i) {
      if (saved[i].requires_grad()) inputs.push_back(i == 0 ? leaf : saved[i]);
    }
    torch::autograd::variable_list found(inputs.size());
    if (y.requires_grad()) {
      check_all_listed(y, inputs);
      found = torch::autograd::grad({y}, inputs, {gradients[0]}, /*retain_graph=*/false,
                                    /*create_graph=*/false, /*allow_unused=*/true);
    }
    torch::autograd::variable_list result(1);  // the state has no gradient
    auto next = found.begin();
    for (const at::Tensor& input : saved) {
      result.push_back(input.requires_grad() ? *next++ : at::Tensor());
    }
    return result;
  }
};

}  // namespace

at::Tensor checkpoint(Region f, const at::Tensor& x, const std::vector<at::Tensor>& trainable) {
  GRAFT_CHECK(f, kArea, "the region must be a function; got an empty one");
  GRAFT_CHECK(x.defined(), kArea, "x must be defined");
  bool needed = x.requires_grad();
  for (const at::Tensor& t : trainable) {
    GRAFT_CHECK(t.defined(), kArea, "trainable tensors must be defined");
    needed = needed || t.requires_grad();
  }
  if (!needed || !at::GradMode::is_enabled()) return f(x);
  auto state = c10::make_intrusive<State>();
  state->run = std::move(f);
  state->parts = nn::BatchRows::current();
  return CheckpointFunction::apply(state, x, at::TensorList(trainable));
}

}  // namespace graft::train
