// PEFT's folders of adapters that start from a part of the base weight (tests/goldens/starts).
#include <graft/attach/attach.h>
#include <graft/io/convert_adapter.h>

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
