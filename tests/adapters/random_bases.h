// What the tests of VeRA and RandLoRA share: a model of two layers, PEFT's golden folders.
#pragma once

#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>
#include <graft/nn/linear.h>

#include "tests/io/file_helpers.h"
#include "tests/support/gradcheck.h"

namespace graft::testing {

/// second(tanh(first(x))): 6 to 10 to 7, so that one layer is taller and one wider.
struct TwoLayers : torch::nn::Module {
  TwoLayers() {
    at::manual_seed(3);
    first = register_module("first", nn::Linear(6, 10));
    second = register_module("second", nn::Linear(torch::nn::LinearOptions(10, 7).bias(false)));
  }
  at::Tensor forward(const at::Tensor& x) { return second->forward(at::tanh(first->forward(x))); }
  static at::Tensor input() { return at::sin(at::arange(24, at::kFloat)).view({4, 6}); }

  nn::Linear first{nullptr}, second{nullptr};
};

/// The golden model of tests/goldens/<method>, as PEFT ran it.
struct Golden {
  explicit Golden(const std::string& method)
      : folder(std::filesystem::path(GRAFT_GOLDENS) / method),
        file(io::SafetensorsFile::open(folder / "model.safetensors")) {}

  void load_base(TwoLayers& model) const {
    const at::NoGradGuard no_grad;
    for (auto& item : model.named_parameters()) item.value().copy_(file.tensor(item.key()));
  }

  const std::filesystem::path folder;
  const io::SafetensorsFile file;
};

/// PEFT's folder `name`: same output and gradients as PEFT's; saved again, the same tensors but for
/// the layers' copies of the bases. `prefix` begins the adapter's tensors.
inline void check_golden_folder(const Golden& golden, const std::string& name,
                                const std::string& prefix) {
  INFO(name);
  TwoLayers model;
  golden.load_base(model);
  auto adapter = attach_from(model, golden.folder / name);
  const at::Tensor x = golden.file.tensor("x").clone().set_requires_grad(true);
  const at::Tensor y = model.forward(x);
  CHECK(distance(y, golden.file.tensor("y")) < 1e-6);
  (y * golden.file.tensor("c")).sum().backward();
  CHECK(distance(x.grad(), golden.file.tensor("grad.x")) < 1e-5);
  for (const auto& layer : adapter.layers())
    for (const auto& [suffix, tensor] : layer.adapter->file_tensors())
      CHECK(distance(tensor.grad(), golden.file.tensor("grad." + layer.name + "." + suffix)) <
            1e-5);

  const TempFolder again;
  adapter.save(again.path());
  const auto theirs = io::SafetensorsFile::open(golden.folder / name / "adapter_model.safetensors");
  const auto ours = io::SafetensorsFile::open(again / "adapter_model.safetensors");
  for (const auto& key : theirs.names()) {
    INFO(key);
    const bool copy = key.starts_with("base_model.model.") &&
                      (key.ends_with("." + prefix + "A") || key.ends_with("." + prefix + "B"));
    const auto& names = ours.names();
    CHECK((std::find(names.begin(), names.end(), key) == names.end()) == copy);
    if (!copy) CHECK(at::equal(ours.tensor(key), theirs.tensor(key)));
  }
}

inline void check_golden(const std::string& method, const std::string& prefix) {
  const Golden golden(method);
  check_golden_folder(golden, "with_projection", prefix);
  check_golden_folder(golden, "without_projection", prefix);
}

}  // namespace graft::testing
