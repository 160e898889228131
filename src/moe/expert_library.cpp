#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/convert_adapter.h>
#include <graft/moe/expert_library.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "../adapters/low_rank.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = "experts";

// "'a' and 'b'", the first two of the layers that one adapter has and another lacks.
void check_same_layers(const ExpertLibrary::Adapter& first, const ExpertLibrary::Adapter& other,
                       size_t number) {
  for (const auto* pair : {&first, &other}) {
    const auto& rest = pair == &first ? other : first;
    for (const auto& [name, lora] : *pair)
      GRAFT_CHECK(rest.count(name) > 0, kArea, "all adapters must sit on the same layers; got '",
                  name, "' in ", pair == &first ? "adapter 0" : concat("adapter ", number),
                  " and not in ", pair == &first ? concat("adapter ", number) : "adapter 0");
  }
}

at::Tensor mean_of(const std::vector<ExpertLibrary::Adapter>& adapters, const std::string& layer,
                   at::Tensor adapters::PlainLora::*factor) {
  std::vector<at::Tensor> all;
  for (const auto& adapter : adapters) all.push_back(adapter.at(layer).*factor);
  return at::stack(all).mean(0);
}

}  // namespace

std::shared_ptr<const ExpertLibrary> ExpertLibrary::read(
    const std::vector<std::filesystem::path>& folders) {
  std::vector<Adapter> adapters;
  for (const auto& folder : folders) adapters.push_back(io::read_plain_lora(folder));
  const auto library = std::make_shared<ExpertLibrary>(std::move(adapters));
  library->folders_ = folders;
  return library;
}

ExpertLibrary::ExpertLibrary(std::vector<Adapter> adapters) : adapters_(std::move(adapters)) {
  GRAFT_CHECK(!adapters_.empty(), kArea, "there must be at least one adapter; got none");
  for (size_t i = 0; i < adapters_.size(); ++i) {
    const Adapter& adapter = adapters_[i];
    GRAFT_CHECK(!adapter.empty(), kArea, "an adapter must have layers; got none in adapter ", i);
    check_same_layers(adapters_.front(), adapter, i);
    const auto& first = adapter.begin()->second;
    ranks_.push_back(first.A.size(0));
    scales_.push_back(first.scale);
    for (const auto& [name, lora] : adapter) {
      GRAFT_CHECK(lora.A.dim() == 2 && lora.B.dim() == 2, kArea,
                  "experts sit on linear layers; got factors ", lora.A.sizes(), " and ",
                  lora.B.sizes(), " (layer '", name, "', adapter ", i, ")");
      GRAFT_CHECK(lora.A.size(0) == ranks_.back() && lora.scale == scales_.back(), kArea,
                  "an adapter must have one rank and one scale on all layers; got rank ",
                  lora.A.size(0), ", scale ", lora.scale, " beside rank ", ranks_.back(),
                  ", scale ", scales_.back(), " (layer '", name, "', adapter ", i, ")");
    }
  }
}

ExpertLibrary::ExpertLibrary(std::vector<int64_t> ranks, std::vector<double> scales)
    : ranks_(std::move(ranks)), scales_(std::move(scales)) {
  GRAFT_CHECK(!ranks_.empty() && ranks_.size() == scales_.size(), kArea,
              "there must be as many ranks as scales, one at least; got ", ranks_.size(), " and ",
              scales_.size());
}

std::vector<std::string> ExpertLibrary::layers() const {
  std::vector<std::string> names;
  if (!adapters_.empty())
    for (const auto& [name, lora] : adapters_.front()) names.push_back(name);
  return names;
}

Experts ExpertLibrary::experts(const char* method, const nn::FrozenLayer& base,
                               const adapters::LayerContext& context) const {
  const auto [out, in] = adapters::dense_sizes(base);
  const auto type = adapters::master_type(base);
  const auto device = nn::weight_of(base).device();
  int64_t sum = 0;
  for (const int64_t rank : ranks_) {
    adapters::check_rank(method, base, rank, 0.0, context);
    sum += rank;
  }
  if (adapters_.empty() || !context.initialise) {
    GRAFT_CHECK(!context.initialise, method, "the adapters' values must be given; got shapes alone",
                adapters::place(context));
    const auto of = at::TensorOptions(type).device(device);
    return {at::zeros({sum, in}, of), at::zeros({out, sum}, of), ranks_, scales_};
  }
  std::vector<at::Tensor> As, Bs;
  for (const Adapter& adapter : adapters_) {
    const auto it = adapter.find(context.name);
    GRAFT_CHECK(it != adapter.end(), method, "the adapters must have the layer; got none for it",
                adapters::place(context));
    const auto& lora = it->second;
    GRAFT_CHECK(lora.A.size(1) == in && lora.B.size(0) == out, method,
                "an adapter's factors must fit the layer, in=", in, " and out=", out, "; got ",
                lora.A.sizes(), " and ", lora.B.sizes(), adapters::place(context));
    As.push_back(lora.A.to(device, type));
    Bs.push_back(lora.B.to(device, type));
  }
  return {at::cat(As, 0), at::cat(Bs, 1), ranks_, scales_};
}

std::shared_ptr<const ExpertLibrary> ExpertLibrary::without_general(
    const ExpertLibrary& general) const {
  GRAFT_CHECK(!adapters_.empty() && !general.adapters_.empty(), kArea,
              "a subtraction needs values; got shapes alone");
  for (const auto& ranks : {ranks_, general.ranks_})
    for (const int64_t rank : ranks)
      GRAFT_CHECK(rank == ranks_.front(), kArea, "a subtraction needs adapters of one rank; got ",
                  rank, " and ", ranks_.front());
  check_same_layers(adapters_.front(), general.adapters_.front(), 0);
  std::vector<Adapter> purified = adapters_;
  for (const std::string& layer : layers()) {
    const at::Tensor A = mean_of(general.adapters_, layer, &adapters::PlainLora::A),
                     B = mean_of(general.adapters_, layer, &adapters::PlainLora::B);
    for (Adapter& adapter : purified) {
      auto& lora = adapter.at(layer);
      lora.A = lora.A - A;
      lora.B = lora.B - B;
    }
  }
  return std::make_shared<ExpertLibrary>(std::move(purified));
}

void ExpertLibrary::write_config(nlohmann::json& config) const {
  config["expert_ranks"] = ranks_;
  config["expert_scales"] = scales_;
}

std::shared_ptr<const ExpertLibrary> ExpertLibrary::read_config(const char* method,
                                                                nlohmann::json& config) {
  adapters::ConfigFields fields(config, method);
  const std::vector<double> scales = fields.numbers("expert_scales");
  std::vector<int64_t> ranks;
  for (const double rank : fields.numbers("expert_ranks")) {
    GRAFT_CHECK(rank >= 1 && rank == static_cast<double>(static_cast<int64_t>(rank)), method,
                "expert_ranks must be whole numbers of at least 1; got ", rank);
    ranks.push_back(static_cast<int64_t>(rank));
  }
  const auto it = config.find("adapters");
  if (it == config.end()) {
    GRAFT_CHECK(!ranks.empty(), method,
                "adapters must name the folders of the adapters that are the experts; got none");
    return std::make_shared<ExpertLibrary>(ranks, scales);
  }
  const nlohmann::json value = std::move(*it);
  config.erase(it);
  std::vector<std::filesystem::path> folders;
  if (value.is_string()) {
    std::string text = value.get<std::string>();
    for (size_t comma; (comma = text.find(',')) != std::string::npos; text.erase(0, comma + 1))
      folders.emplace_back(text.substr(0, comma));
    folders.emplace_back(text);
  } else {
    GRAFT_CHECK(value.is_array(), method, "adapters must be a list of folders; got ", value.dump());
    for (const auto& folder : value) {
      GRAFT_CHECK(folder.is_string(), method, "adapters must be a list of folders; got ",
                  value.dump());
      folders.emplace_back(folder.get<std::string>());
    }
  }
  return read(folders);
}

void check_library(const char* method, const std::shared_ptr<const ExpertLibrary>& library) {
  GRAFT_CHECK(library != nullptr, method,
              "the experts must be given (ExpertLibrary::read); got none");
}

}  // namespace graft::moe
