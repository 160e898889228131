// PEFT's folders of adapters that start from a part of the base weight (tests/goldens/starts).
#include <graft/attach/attach.h>
#include <graft/io/atomic_file.h>
#include <graft/io/convert_adapter.h>
#include <graft/io/safetensors.h>

#include "tests/adapters/random_bases.h"

namespace {

using graft::attach_from;
using graft::io::convert_to_lora;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::Golden;
using graft::testing::TempFolder;
using graft::testing::TwoLayers;

const Golden& golden() {
  static const Golden starts("starts");
  return starts;
}

void check_computes(const std::filesystem::path& folder, const std::string& name) {
  TwoLayers model;
  golden().load_base(model);
  auto adapter = attach_from(model, folder);
  CHECK(distance(model.forward(golden().file.tensor("x")), golden().file.tensor("y." + name)) <
        1e-5);
}

}  // namespace

TEST_CASE("PEFT's PiSSA and OLoRA folders open: the start is found again from the weight",
          "[attach][init][golden]") {
  for (const std::string name : {"pissa", "olora"}) {
    INFO(name);
    check_computes(golden().folder / name, name);
    const TempFolder folder;
    const auto base = golden().folder / "model.safetensors";
    CHECK(convert_to_lora(golden().folder / name, folder.path() / "plain", {.base = base})
              .largest_rank == 4);
    check_computes(folder.path() / "plain", name);
    CHECK(contains(error_of([&] { convert_to_lora(golden().folder / name, folder.path() / "no"); }),
                   "so the base model must be given (--model); got none"));
  }
}

TEST_CASE("PiSSA's start is found again with the roundings it had in PEFT", "[attach][init]") {
  // Two singular values closer than fp32 can tell apart: which vectors count as the fourth is
  // rounding, and the folder's adapter is trained against that.
  const int64_t rank = 4;
  at::manual_seed(7);
  at::Tensor S = at::pow(0.95, at::arange(80, at::kDouble));
  S[rank] = S[rank - 1];
  const at::Tensor U = std::get<0>(at::linalg_qr(at::randn({96, 80}, at::kDouble))),
                   V = std::get<0>(at::linalg_qr(at::randn({80, 80}, at::kDouble)));
  const at::Tensor W = (U * S).mm(V.t()).to(at::kFloat);
  struct OneLayer : torch::nn::Module {
    OneLayer() { only = register_module("only", graft::nn::Linear(80, 96)); }
    graft::nn::Linear only{nullptr};
  };
  OneLayer model;
  {
    const at::NoGradGuard no_grad;
    model.only->weight.copy_(W);
  }
  const auto [P, values, Qt] = at::linalg_svd(W, /*full_matrices=*/false);
  const at::Tensor root = values.narrow(0, 0, rank).sqrt();
  const TempFolder folder;
  graft::io::write_safetensors(
      folder.path() / "adapter_model.safetensors",
      {{"base_model.model.only.lora_A.weight", root.unsqueeze(1) * Qt.narrow(0, 0, rank)},
       {"base_model.model.only.lora_B.weight", (P.narrow(1, 0, rank) * root).contiguous()}});
  graft::io::write_text_file(
      folder.path() / "adapter_config.json",
      R"({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "pissa",)"
      R"( "target_modules": ["only"]})");
  graft::io::write_safetensors(folder.path() / "base.safetensors", {{"only.weight", W}});
  const at::Tensor x = at::randn({5, 80});
  const at::Tensor before = model.only->forward(x);
  auto adapter = attach_from(model, folder.path());
  CHECK(distance(model.only->forward(x), before) < 1e-5);
  {
    const at::NoGradGuard no_grad;
    adapter.parameters().front().mul_(2);
  }
  CHECK(distance(model.only->forward(x), before) > 1e-2);
  adapter.detach();

  convert_to_lora(folder.path(), folder.path() / "plain",
                  {.base = folder.path() / "base.safetensors"});
  auto plain = attach_from(model, folder.path() / "plain");
  CHECK(distance(model.only->forward(x), before) < 1e-5);
}

TEST_CASE("PEFT's folders whose start is lost are refused, and converted with the start",
          "[attach][init][golden]") {
  for (const std::string name : {"pissa_niter_2", "lora_ga", "corda"}) {
    INFO(name);
    TwoLayers model;
    CHECK(contains(error_of([&] { attach_from(model, golden().folder / name); }),
                   "a start by " + name + " cannot be found again from the base weight"));
    const TempFolder folder;
    convert_to_lora(golden().folder / name, folder.path() / "plain",
                    {.start = golden().folder / (name + "_start")});
    check_computes(folder.path() / "plain", name);
    CHECK(contains(error_of([&] {
                     convert_to_lora(golden().folder / name, folder.path() / "no",
                                     {.base = golden().folder / "model.safetensors"});
                   }),
                   "so the values before training must be given (--start); got none"));
    CHECK(contains(error_of([&] {
                     convert_to_lora(golden().folder / name, folder.path() / "no",
                                     {.start = golden().folder / "nowhere"});
                   }),
                   "nowhere"));
    CHECK_FALSE(std::filesystem::exists(folder.path() / "no"));
  }
  CHECK(contains(error_of([&] {
                   const TempFolder folder;
                   convert_to_lora(golden().folder / "lora_ga", folder.path() / "a",
                                   {.start = golden().folder / "lora_ga_start"});
                   convert_to_lora(folder.path() / "a", folder.path() / "b");
                 }),
                 "the folder is plain LoRA already"));
}
