// What listens to a layer while batches run over the model; private to the attach folder.
#pragma once

#include <graft/init/activation_svd.h>
#include <graft/init/named_start.h>
#include <graft/nn/adapter.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace graft {

// Sits on a Linear layer in an adapter's place, computes what the layer computes, and listens.
class InitRecorder : public nn::Adapter {
 public:
  InitRecorder() : nn::Adapter("init") {}
  std::string_view method() const override { return "init"; }
  Merged merge(const nn::FrozenLayer&) const override;
  std::vector<FileTensor> file_tensors() const override { return {}; }
  at::Tensor apply(const nn::FrozenLayer& layer, const at::Tensor& x) final {
    return record(std::get<nn::FrozenLinear>(layer), x);
  }
  virtual at::Tensor record(const nn::FrozenLinear& layer, const at::Tensor& x) = 0;
};

// Adds up the loss's gradient with respect to the weight, without the weight asking for one: no
// second gradient of that size is ever alive. The sum is made in the first backward, out of what
// the activations of later layers leave free.
class GradientRecorder final : public InitRecorder {
 public:
  GradientRecorder();
  at::Tensor record(const nn::FrozenLinear& layer, const at::Tensor& x) override;
  at::Tensor sum;  // [out, in], fp32 or fp64; undefined before the first backward
  int64_t backward_runs = 0;

 private:
  // Lets backward reach a layer whose input asks for no gradient; a parameter, so that a model that
  // recomputes its blocks finds it among theirs.
  at::Tensor anchor_;
};

// Rows of one layer's input, or of several layers' that are handed the same tensor.
class InputSink {
 public:
  virtual ~InputSink() = default;
  virtual void take(const at::Tensor& rows) = 0;
};

// C: the sum of x x^T over the tokens.
class CovarianceSink final : public InputSink {
 public:
  void take(const at::Tensor& rows) override;
  at::Tensor sum;
  int64_t rows = 0;
};

// EVA's directions.
class DirectionSink final : public InputSink {
 public:
  DirectionSink(int64_t components, double tolerance) : svd(components, tolerance) {}
  void take(const at::Tensor& rows) override {
    if (!settled) svd.update(rows);
  }
  init::ActivationSvd svd;
  bool settled = false;
};

// Which layers are handed the same tensor: found in the first batch, where every layer reports its
// input in the order of the forward pass. One sink serves all of a group.
class InputGroups {
 public:
  // Makes a group's sink, when all of its layers are known.
  explicit InputGroups(std::function<std::unique_ptr<InputSink>(int64_t group)> make_sink)
      : make_sink_(std::move(make_sink)) {}

  // The rows that count in the current batch; undefined: all.
  at::Tensor mask;

  int64_t add_layer();  // returns its number
  // The input of that layer; handed to the group's sink once a batch.
  void report(int64_t layer, const at::Tensor& x);
  void end_batch();

  int64_t group_of(int64_t layer) const { return group_[layer]; }  // -1: has not run
  int64_t groups() const { return static_cast<int64_t>(owner_.size()); }
  // The layer that a group's sink listens to, the first in the forward pass.
  int64_t owner(int64_t group) const { return owner_[group]; }
  std::vector<int64_t> members(int64_t group) const;
  InputSink& sink(int64_t group) const { return *sinks_[group]; }

 private:
  at::Tensor counting_rows(const at::Tensor& x) const;
  void find_group(int64_t layer, const at::Tensor& x);
  void close_group();

  std::function<std::unique_ptr<InputSink>(int64_t group)> make_sink_;
  bool finding_ = true;                            // the first batch
  std::vector<int64_t> group_;                     // by layer
  std::vector<int64_t> owner_;                     // by group
  std::vector<std::unique_ptr<InputSink>> sinks_;  // by group
  // The newest group while it may still get layers: its tensor, kept alive so that no other can be
  // at its place, and copies of its owner's rows, since a model may write to the tensor afterwards.
  at::Tensor open_;
  std::vector<at::Tensor> open_rows_;
};

// Reports a layer's input.
class InputRecorder final : public InitRecorder {
 public:
  InputRecorder(InputGroups& groups, int64_t layer) : groups_(groups), layer_(layer) {}
  at::Tensor record(const nn::FrozenLinear& layer, const at::Tensor& x) override;

 private:
  InputGroups& groups_;
  int64_t layer_;
};

}  // namespace graft
