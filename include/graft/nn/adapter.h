/// What every adapter is to the layer it sits on.
#pragma once

#include <graft/nn/frozen_layer.h>
#include <graft/nn/live_rows.h>
#include <graft/ops/lora_linear.h>
#include <torch/nn/module.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::nn {

/// An adapter of one layer: owns its parameters, is handed the frozen layer, returns the whole
/// adapted output. Write one by deriving from adapters::AdapterModule, which fills in `apply` and
/// `merged_weight`.
class Adapter : public torch::nn::Module {
 public:
  /// A tensor of the adapter as files name it: "lora_A.weight".
  struct FileTensor {
    std::string suffix;
    at::Tensor tensor;  ///< shares storage with the parameter: loading copies into it (but see
                        ///< take_file_tensors)
  };

  /// A plain layer's weight and bias (undefined where it has none).
  struct Merged {
    at::Tensor weight;
    at::Tensor bias;
  };

  using torch::nn::Module::Module;

  /// The method's name: "lora".
  virtual std::string_view method() const = 0;
  /// The adapted layer's output for x, the base's share included.
  virtual at::Tensor apply(const FrozenLayer& base, const at::Tensor& x) = 0;
  /// Where the adapter's whole work on a Linear is ops::lora_linear: the term of the next pass, its
  /// mask drawn, with which the caller computes the layer in place of `apply`. Else nothing.
  virtual std::optional<ops::LoraTerm> linear_term() { return std::nullopt; }
  /// What the plain layer must hold to give this adapter's output; throws where no such weight
  /// exists.
  virtual Merged merge(const FrozenLayer& base) const = 0;
  /// What a file stores of this adapter, in a fixed order.
  virtual std::vector<FileTensor> file_tensors() const = 0;
  /// After loading has copied into `file_tensors()`: for adapters whose file tensors are copies in
  /// another form, which are taken apart here.
  virtual void take_file_tensors(const std::vector<FileTensor>&) {}
  /// Where `file_tensors()` are copies: the trained tensors alone, sharing storage, as a file holds
  /// them that leaves the rest to be found again from the base weight.
  virtual std::vector<FileTensor> trained_file_tensors() const { return file_tensors(); }
  /// What a file stores once for all layers, under keys that name no layer: "base_model.vera_A".
  /// Every layer reports the same tensors.
  virtual std::vector<FileTensor> shared_file_tensors() const { return {}; }
  /// State that a resumed run needs besides the tensors: counters of random draws and the like.
  virtual std::vector<int64_t> counters() const { return {}; }
  /// Puts `counters()` back.
  virtual void set_counters(const std::vector<int64_t>&) {}
  /// Tensors that a resumed run needs besides those of files: running averages and the like. They
  /// share storage with the adapter, so restoring copies into them; not const, since an adapter may
  /// make them when it is asked.
  virtual std::vector<FileTensor> state_tensors() { return {}; }
  /// The part of the parameter of that name ("lora_A") that the current step trains, for methods
  /// that train some rows at a time; empty: all of it, as in most methods. A parameter that has
  /// live rows has them, along the same dimension, in every step.
  virtual std::optional<LiveRows> live_rows(std::string_view) const { return std::nullopt; }
};

}  // namespace graft::nn
