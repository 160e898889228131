#include <graft/adapters/paca.h>
#include <graft/adapters/shira.h>
#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>

#include "tests/io/file_helpers.h"
#include "tests/support/tiny_models.h"

using graft::attach;
using graft::attach_from;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::some_tokens;
using graft::testing::TempFolder;

TEST_CASE("positions outside of the weight are refused when a folder is read", "[attach][files]") {
  const auto refusal = [](const auto& options, const std::string& suffix) {
    const TempFolder folder;
    {
      GraftDecoder model;
      auto adapter = attach(model, options, {.targets = {"q_proj"}});
      model.forward(some_tokens());
      adapter.save(folder.path());
    }
    const auto path = folder.path() / "adapter_model.safetensors";
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    {
      const auto file = graft::io::SafetensorsFile::open(path);
      for (const auto& name : file.names()) tensors.emplace_back(name, file.tensor(name).clone());
    }
    for (auto& [name, tensor] : tensors)
      if (name.ends_with("layers.1.q_proj." + suffix)) tensor.view(-1)[0] = 8;
    graft::io::write_safetensors(path, tensors);
    GraftDecoder model;
    const std::string message = error_of([&] { attach_from(model, folder.path()); });
    CHECK(contains(message, "layers.1.q_proj"));
    return message;
  };
  CHECK(contains(refusal(graft::adapters::ShiraOptions{.rank = 1}, "shira_indices"), "[shira]"));
  CHECK(contains(refusal(graft::adapters::PacaOptions{.rank = 2}, "paca_indices"), "[paca]"));
}
