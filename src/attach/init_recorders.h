// What listens to a layer while batches run over the model; private to the attach folder.
#pragma once

#include <graft/init/activation_svd.h>
#include <graft/init/named_start.h>
#include <graft/nn/adapter.h>

#include <memory>
#include <optional>
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
// second gradient of that size is ever alive.
class GradientRecorder final : public InitRecorder {
 public:
  explicit GradientRecorder(const nn::FrozenLinear& layer);
  at::Tensor record(const nn::FrozenLinear& layer, const at::Tensor& x) override;
  at::Tensor sum;  // [out, in], fp32 or fp64
  int64_t backward_runs = 0;

 private:
  at::Tensor anchor_;  // lets backward reach a layer whose input asks for no gradient
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
  // The rows that count in the current batch; undefined: all.
  at::Tensor mask;
  bool finding = true;  // the first batch

  int64_t add_layer();  // returns its number
  // The input of that layer; handed to the group's sink once a batch.
  void report(int64_t layer, const at::Tensor& x);
  void end_batch() { last_ = at::Tensor(); }

  int64_t group_of(int64_t layer) const { return group_[layer]; }
  int64_t groups() const { return static_cast<int64_t>(owner_.size()); }
  // The layer that a group's sink listens to, the first in the forward pass.
  int64_t owner(int64_t group) const { return owner_[group]; }
  std::vector<int64_t> members(int64_t group) const;
  std::vector<std::unique_ptr<InputSink>> sinks;  // one a group

 private:
  std::vector<int64_t> group_;  // by layer; -1: has not run
  std::vector<int64_t> owner_;  // by group
  at::Tensor last_;             // kept alive, so that no other tensor can be at its place
  int64_t last_group_ = -1;
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
