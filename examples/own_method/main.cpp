// A method of your own, without a line in graft: y = v * (W x + b), one trained gain v per output.
// usage: own_method [FOLDER]; trains it on a small model of torch::nn layers, saves and loads it.
#include <graft/adapters/config_fields.h>
#include <graft/attach/attach.h>
#include <graft/train/parameter_groups.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <iostream>
#include <nlohmann/json.hpp>

using namespace graft;
using namespace graft::adapters;
using Linear = nn::FrozenLinear;

struct GainOptions {
  using Method = class GainImpl;  // how attach(*model, GainOptions{}) finds the method
  double start = 1.0;             // 1 leaves the base's output as it is, bit for bit
  void validate() const { GRAFT_CHECK(start != 0.0, "gain", "start must not be 0; got ", start); }
};

class GainImpl : public AdapterModule<GainImpl, GainOptions> {
 public:
  static constexpr const char* kName = "gain";
  GainImpl(const nn::FrozenLayer& base, const GainOptions& options, const LayerContext& context)
      : AdapterModule(options, context) {
    const at::Tensor weight = nn::weight_of(base);
    v = register_parameter("gain", at::full({weight.size(0)}, options.start, weight.options()));
  }
  at::Tensor forward(const Linear& base, const at::Tensor& x) { return base.apply(x) * v; }
  // The next two make merge() work; a method that depends on its input leaves them out.
  at::Tensor merged_weight(const Linear& base) const { return base.weight * v.unsqueeze(1); }
  at::Tensor merged_bias(const Linear& base) const {
    return base.bias.defined() ? base.bias * v : base.bias;
  }
  std::vector<FileTensor> file_tensors() const override { return {{"gain", v}}; }
  static void write_config(const GainOptions& o, nlohmann::json& json) { json["start"] = o.start; }
  static std::string describe(const GainOptions& o) { return concat("start ", o.start); }
  at::Tensor v;  // [out]
};

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, GainImpl::kName);  // a field that nobody takes is refused later
  return make_recipe(GainOptions{.start = fields.number("start", 1.0)});
}

// The same base every time, as a checkpoint would give it.
torch::nn::Sequential make_network() {
  at::manual_seed(1);
  return torch::nn::Sequential(torch::nn::Linear(8, 64), torch::nn::Tanh(),
                               torch::nn::Linear(64, 4));
}

void run(const std::string& folder) {
  // "GAIN" is the peft_type in adapter_config.json; {} stands for: every such file is this method.
  register_method({"gain", "GAIN", "one gain per output", {}, read_config});
  torch::nn::Sequential network = make_network(), fresh = make_network();
  const at::Tensor x = at::randn({64, 8}), y = at::randn({64, 4});
  const auto loss = [&] { return at::mse_loss(network->forward(x), y); };
  auto adapter = attach(*network, GainOptions{});
  auto active = adapter.activate();  // layers of torch::nn run their adapters in such a scope
  train::AdamW optimizer(train::parameter_groups(adapter, 0.0));
  const double before = loss().item<double>();
  for (int step = 0; step < 100; ++step, optimizer.zero_grad()) {
    loss().backward();
    optimizer.step(0.02);
  }
  const double after = loss().item<double>();
  GRAFT_CHECK(after < 0.9 * before, "gain", "the loss must fall; got ", before, " -> ", after);
  adapter.save(folder);
  auto fresh_active = attach_from(*fresh, folder).activate();
  const at::Tensor expected = network->forward(x);
  GRAFT_CHECK(expected.equal(fresh->forward(x)), "gain", "a loaded adapter must do the same");
  adapter.merge();
  GRAFT_CHECK(expected.allclose(network->forward(x), 1e-4, 1e-5), "gain", "merged must be equal");
  std::cout << "gain: loss " << before << " -> " << after << std::endl;
}

int main(int argc, char** argv) try {
  run(argc > 1 ? argv[1] : "gain_adapter");
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 1;
}
