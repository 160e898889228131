/// A method together with its options, ready to be put on any layer; and the list of all methods.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/init/named_start.h>
#include <graft/nn/adapter.h>
#include <nlohmann/json_fwd.hpp>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::adapters {

/// Rank and alpha of one layer where they differ from the method's options.
struct LayerOverride {
  std::optional<int64_t> rank;
  std::optional<double> alpha;
};

/// Where a training run stands when it calls the hooks below.
struct StepInfo {
  int64_t step = 0;         ///< the optimiser's step, from 0
  int64_t total_steps = 0;  ///< steps of the whole run; 0: unknown
  double lr = 0.0;          ///< this step's learning rate
  uint64_t seed = 0;        ///< the run's seed
};

/// All adapters of one attached method, in the order of the layers.
using AdapterList = std::vector<std::shared_ptr<nn::Adapter>>;

/// Named figures of a step for the metrics: {"active_rank", 5.0}.
using Figures = std::vector<std::pair<std::string, double>>;

/// How many tokens each expert of a layer worked on, by the layer's name.
using ExpertUse = std::map<std::string, std::vector<int64_t>>;

/// How the optimiser treats one parameter.
struct ParameterRule {
  double lr_scale = 1.0;  ///< multiplies the run's learning rate
  bool decays = true;     ///< whether weight decay applies
};

/// How a method's factors start.
struct StartPlan {
  init::Kind kind;             ///< kaiming where the method has no choice
  init::StartOptions options;  ///< the defaults where the method has none
  int64_t rank = 0;            ///< of a layer without a pattern; 0: the method has no rank
  double alpha = 0.0;          ///< likewise
};

/// A method and its options, type-erased: what `attach`, the config reader and the programs
/// exchange.
class Recipe {
 public:
  virtual ~Recipe() = default;
  /// The method's name: "lora".
  virtual std::string_view method() const = 0;
  /// Throws unless the options are sound.
  virtual void validate() const = 0;
  /// A new adapter for that layer, initialised; throws when the method does not fit it.
  virtual std::shared_ptr<nn::Adapter> make(const nn::FrozenLayer& layer,
                                            const LayerContext& context,
                                            const LayerOverride& override_) const = 0;
  /// The method's own fields of an adapter_config.json, under the names that PEFT gives them.
  virtual void write_config(nlohmann::json& config) const = 0;
  /// One line for people: "rank 8, alpha 16".
  virtual std::string describe() const = 0;

  /// What the layers of one attached adapter have in common (random bases, say), made before the
  /// first of them and handed to each in LayerContext::shared; null for most methods.
  virtual std::shared_ptr<void> make_shared_part(
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const LayerContext& context) const = 0;
  /// Before a step's first forward pass.
  virtual void begin_step(const AdapterList& adapters, const StepInfo& info) const = 0;
  /// A term that the method adds to the loss of the step, or undefined.
  virtual at::Tensor penalty(const AdapterList& adapters) const = 0;
  /// After backward and before the optimiser's step, for methods that change gradients. The norm
  /// that clipping goes by is taken before it.
  virtual void before_update(const AdapterList& adapters, const StepInfo& info) const = 0;
  /// After the optimiser's step, while the gradients are still there.
  virtual void end_step(const AdapterList& adapters, const StepInfo& info) const = 0;
  /// The method's own figures of the step.
  virtual Figures figures(const AdapterList& adapters) const = 0;
  /// How the optimiser treats the parameter of that name ("lora_B").
  virtual ParameterRule rule(std::string_view parameter) const = 0;
  /// Which initialiser the options name, and what it is told; attach gathers what it needs.
  virtual StartPlan start_plan() const = 0;

  /// Whether the method takes a gated feed-forward block (nn/gated_mlp.h) as one layer where the
  /// targets name its three; else they are three layers.
  virtual bool adapts_blocks() const { return false; }
  /// Whether all training passes over tensors of the same shapes queue the same work and add
  /// nothing to the loss, so that a graph can repeat them (train/pass_graph.h).
  virtual bool passes_are_alike() const { return false; }
  /// The use of each expert since attaching, in training passes or in those in eval mode; empty for
  /// methods without experts.
  virtual ExpertUse expert_use(const AdapterList&, bool /*training*/) const { return {}; }
};

/// Under which names a method's configuration holds what the programs' flags set; empty: the method
/// has no such option.
struct OptionKeys {
  std::string rank = "r";
  std::string alpha = "lora_alpha";
  std::string dropout = "lora_dropout";
  std::string rslora = "use_rslora";
  std::string init = "init_lora_weights";
  std::string experts = {};
  std::string top_k = {};
  std::string router = {};
  std::string balance_loss = {};
};

/// A plain LoRA layer with the same update: W + scale * B A.
struct PlainLora {
  at::Tensor A;  ///< [r, in...]; r = 0: the layer has no update left
  at::Tensor B;  ///< [out, r]
  double scale = 1.0;
};

/// What a file stores of one layer, by suffix ("lora_A.weight"); tensors that the file stores once
/// for all layers are there too, under their whole keys, and the layer's input size as
/// "in_features" where it is known (files do not hold it, and VeRA's tensors do not tell).
using StoredLayer = std::map<std::string, at::Tensor>;

/// How a method is known by name, and how its options are read.
struct MethodEntry {
  std::string name;       ///< "lora"
  std::string peft_type;  ///< "LORA": the value in adapter_config.json
  std::string summary;    ///< one line for --help
  /// Whether a config with this peft_type means this method, where several share the type (LoRA and
  /// DoRA do).
  std::function<bool(const nlohmann::json& config)> claims;
  /// Reads the method's fields out of a config; a field that is missing has PEFT's default. It
  /// erases what it has understood, so that the caller can refuse what is left.
  std::function<std::shared_ptr<const Recipe>(nlohmann::json& config)> read_config;
  OptionKeys keys = {};
  /// The plain LoRA form of a stored layer, without the base (adapter convert, truncate, prune);
  /// empty where the algebra has none. `rank`: only the leading units, for methods whose ranks nest
  /// (DyLoRA); 0: what is stored, units that are switched off left out.
  std::function<PlainLora(const Recipe& recipe, const StoredLayer& layer, int64_t rank)> to_lora =
      {};
  /// What the suffixes of the method's tensors start with in files.
  std::string tensor_prefix = "lora_";
  /// Whether the leading units alone are an adapter too, so that `rank` means something in to_lora.
  bool ranks_nest = false;
  /// Where a file keeps the tensors of the layer of that name; empty: under PEFT's path,
  /// "base_model.model." and the name.
  std::function<std::string(const std::string& layer)> file_path = {};
  /// The layer that a key of a file belongs to, where `file_path` is given.
  std::function<std::string(const std::string& key)> layer_of_key = {};
  /// Older and foreign forms as the present one: a tensor's key, and a whole configuration before
  /// anything is read from it; empty: there is one form.
  std::function<std::string(std::string key)> modern_key = {};
  std::function<void(nlohmann::json& config)> modern_config = {};
};

/// Adds a method to the list; throws when the name is taken. Call it at start-up; built-in methods
/// are there already.
void register_method(MethodEntry entry);

/// The entry of that name; an unknown name lists the known ones.
const MethodEntry& find_method(std::string_view name);

/// Whether a LORA configuration means DoRA: its use_dora is true.
bool is_dora(const nlohmann::json& config);

/// The method that a config names by `peft_type`; throws when there is none, listing the known
/// types.
const MethodEntry& method_of_config(const nlohmann::json& config);

/// All methods' names, in the order of registration.
std::vector<std::string> method_names();

/// Defines the Recipe of a method from its options. Beside the functions that every method has
/// (adapter_module.h) it takes these static ones of the method where they exist, all optional:
///   std::shared_ptr<Shared> make_shared_part(options, layers, context)
///   void begin_step(const std::vector<Method*>&, const StepInfo&)
///   before_update and end_step likewise
///   at::Tensor penalty(const std::vector<Method*>&)
///   Figures figures(const std::vector<Method*>&)
///   ExpertUse expert_use(const std::vector<Method*>&, bool training)
///   ParameterRule rule(options, std::string_view parameter)
template <class Method>
class RecipeOf final : public Recipe {
 public:
  using Options = typename Method::Options;
  explicit RecipeOf(Options options) : options_(std::move(options)) {}

  std::string_view method() const override { return Method::kName; }
  void validate() const override { options_.validate(); }
  void write_config(nlohmann::json& config) const override {
    Method::write_config(options_, config);
  }
  std::string describe() const override { return Method::describe(options_); }

  std::shared_ptr<nn::Adapter> make(const nn::FrozenLayer& layer, const LayerContext& context,
                                    const LayerOverride& override_) const override {
    Method::check_supports(layer, context.name);
    Options options = options_;
    if (override_.rank) {
      if constexpr (requires { options.rank = *override_.rank; })
        options.rank = *override_.rank;
      else
        fail(Method::kName,
             "this method has no rank; got a rank_pattern for layer '" + context.name + "'");
    }
    if (override_.alpha) {
      if constexpr (requires { options.alpha = *override_.alpha; })
        options.alpha = *override_.alpha;
      else
        fail(Method::kName,
             "this method has no alpha; got an alpha_pattern for layer '" + context.name + "'");
    }
    options.validate();
    return std::make_shared<Method>(layer, options, context);
  }

  std::shared_ptr<void> make_shared_part(
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const LayerContext& context) const override {
    if constexpr (requires { Method::make_shared_part(options_, layers, context); })
      return Method::make_shared_part(options_, layers, context);
    else
      return nullptr;
  }
  void begin_step(const AdapterList& adapters, const StepInfo& info) const override {
    if constexpr (requires { Method::begin_step(typed(adapters), info); })
      Method::begin_step(typed(adapters), info);
  }
  at::Tensor penalty(const AdapterList& adapters) const override {
    if constexpr (requires { Method::penalty(typed(adapters)); })
      return Method::penalty(typed(adapters));
    else
      return {};
  }
  void before_update(const AdapterList& adapters, const StepInfo& info) const override {
    if constexpr (requires { Method::before_update(typed(adapters), info); })
      Method::before_update(typed(adapters), info);
  }
  void end_step(const AdapterList& adapters, const StepInfo& info) const override {
    if constexpr (requires { Method::end_step(typed(adapters), info); })
      Method::end_step(typed(adapters), info);
  }
  Figures figures(const AdapterList& adapters) const override {
    if constexpr (requires { Method::figures(typed(adapters)); })
      return Method::figures(typed(adapters));
    else
      return {};
  }
  ParameterRule rule(std::string_view parameter) const override {
    if constexpr (requires { Method::rule(options_, parameter); })
      return Method::rule(options_, parameter);
    else
      return {};
  }

  // A method with hooks before or inside the pass may decide something there.
  bool passes_are_alike() const override {
    return !(
        requires(std::vector<Method*> list, StepInfo info) { Method::begin_step(list, info); } ||
        requires(std::vector<Method*> list) { Method::penalty(list); } ||
        requires(std::vector<Method*> list) { Method::expert_use(list, true); });
  }

  ExpertUse expert_use(const AdapterList& adapters, bool training) const override {
    if constexpr (requires { Method::expert_use(typed(adapters), training); })
      return Method::expert_use(typed(adapters), training);
    else
      return {};
  }

  StartPlan start_plan() const override {
    StartPlan plan;
    // An option of the same name that means something else is a method's own affair.
    if constexpr (requires { init::find_kind(options_.init); })
      plan.kind = init::find_kind(options_.init);
    if constexpr (requires { plan.options = options_.start; }) plan.options = options_.start;
    if constexpr (requires { plan.rank = options_.rank; }) plan.rank = options_.rank;
    if constexpr (requires { plan.alpha = options_.alpha; }) plan.alpha = options_.alpha;
    return plan;
  }

  const Options& options() const { return options_; }

 private:
  // The adapters of a recipe are all of its method.
  static std::vector<Method*> typed(const AdapterList& adapters) {
    std::vector<Method*> list;
    for (const auto& adapter : adapters) list.push_back(static_cast<Method*>(adapter.get()));
    return list;
  }

  Options options_;
};

/// The recipe of typed options: `make_recipe(LoraOptions{.rank = 8})`. Each method's header
/// overloads it.
template <class Options>
requires requires {
  typename Options::Method;
}
std::shared_ptr<const Recipe> make_recipe(Options options) {
  return std::make_shared<RecipeOf<typename Options::Method>>(std::move(options));
}

}  // namespace graft::adapters
