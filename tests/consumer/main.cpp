// A model that graft has never seen: adapted, trained with torch's own optimizer, saved, loaded.
// usage: consumer FOLDER; exits 1 with one line on stderr when a promise is broken.
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/core/error.h>
#include <graft/nn/linear.h>
#include <graft/version.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/adamw.h>

#include <exception>
#include <iostream>

namespace {

// Two layers that adapters sit on, and one of torch's own that stays as it is.
struct NetworkImpl : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& x) { return head(torch::tanh(down(up(x)))); }

  graft::nn::Linear up = register_module("up", graft::nn::Linear(16, 32));
  graft::nn::Linear down = register_module("down", graft::nn::Linear(32, 16));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(16, 4));
};
TORCH_MODULE(Network);

torch::Tensor loss_of(Network& network, const torch::Tensor& x, const torch::Tensor& y) {
  return torch::nn::functional::mse_loss(network->forward(x), y);
}

void run(const std::string& folder) {
  torch::manual_seed(1);
  Network network, fresh;
  const torch::Tensor x = torch::randn({64, 16}), y = torch::randn({64, 4});
  std::vector<torch::Tensor> base;
  for (size_t i = 0; i < network->parameters().size(); ++i) {
    base.push_back(network->parameters()[i].detach().clone());
    fresh->parameters()[i].set_data(base.back().clone());
  }

  auto adapter =
      graft::attach(*network, graft::adapters::LoraOptions{.rank = 8}, {.targets = {"up", "down"}});
  torch::optim::AdamW optimizer(adapter.parameters(), torch::optim::AdamWOptions(1e-2));
  const double before = loss_of(network, x, y).item<double>();
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    loss_of(network, x, y).backward();
    optimizer.step();
  }
  const double after = loss_of(network, x, y).item<double>();
  GRAFT_CHECK(after < 0.8 * before, "consumer", "training must lower the loss; got ", before,
              " -> ", after);

  adapter.save(folder);
  graft::attach_from(*fresh, folder);
  GRAFT_CHECK(network->forward(x).equal(fresh->forward(x)), "consumer",
              "a saved adapter must give the same output on the same base; got another");

  adapter.detach();
  const auto parameters = network->parameters();
  GRAFT_CHECK(parameters.size() == base.size(), "consumer", "detach must leave ", base.size(),
              " parameters; got ", parameters.size());
  for (size_t i = 0; i < base.size(); ++i)
    GRAFT_CHECK(parameters[i].equal(base[i]), "consumer",
                "training must not touch the base; got a changed parameter ", i);
  std::cout << "graft " << GRAFT_VERSION << " with LibTorch " << GRAFT_LIBTORCH_VERSION << ": loss "
            << before << " -> " << after << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    GRAFT_CHECK(argc == 2, "consumer", "one argument, the output folder; got ", argc - 1);
    run(argv[1]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
}
