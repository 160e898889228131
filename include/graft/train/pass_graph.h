/// Forward and backward pass of a CUDA device as one launch: a CUDA graph.
///
/// A small model on a fast device waits for the host, which queues some thousand kernels a step. A
/// graph queues them in one call. The optimiser's few launches stay outside.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/attach/attach.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace graft::ops {
class DeviceGraph;
}

namespace graft::train {

/// Repeats a pass. The first passes run as ever, which loads what libraries load late; then one is
/// captured, and from there on the graph runs.
///
///   train::PassGraph graph(adapter, device, [&] {
///     const at::Tensor loss = model->loss(tokens, targets, normalizer);
///     loss.backward();
///     return loss.detach();
///   });
///   for (...) { tokens.copy_(...); targets.copy_(...); at::Tensor loss = graph.run(); ... }
///
/// The pass must queue the same work each time: it reads its inputs from tensors that keep their
/// place and shape, and waits for nothing on the device (no `item()`, no tensor made from host
/// memory). Gradients add up in `.grad()`, as they do without a graph; dropping them between steps
/// is seen. Dropout draws the masks that it would draw without a graph, and the adapters' counters
/// move on with them, so that a checkpoint may be written at any time.
class PassGraph {
 public:
  /// `adapter`: the only one at work in the pass. Throws where its method's passes are not alike
  /// (Recipe::passes_are_alike), and where this build has no kernels for the device.
  PassGraph(AttachedAdapter adapter, const at::Device& device, std::function<at::Tensor()> pass);
  ~PassGraph();
  PassGraph(const PassGraph&) = delete;
  PassGraph& operator=(const PassGraph&) = delete;

  /// One pass; returns what it returns, in memory that the next call overwrites.
  at::Tensor run();

 private:
  using Counters = std::vector<std::vector<int64_t>>;

  Counters counters() const;
  void set_counters(const Counters& values) const;
  void run_as_ever();
  void capture();
  void keep_gradients();
  uint32_t later() const;

  AttachedAdapter adapter_;
  at::Device device_;
  std::function<at::Tensor()> pass_;
  std::vector<at::Tensor> parameters_, gradients_;
  Counters advance_, captured_;  // of a pass; where the captured one began
  std::unique_ptr<ops::DeviceGraph> graph_;
  at::Tensor result_;
  int passes_ = 0;
};

}  // namespace graft::train
