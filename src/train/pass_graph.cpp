#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/train/pass_graph.h>

#include <optional>

#include "../ops/device_kernels.h"

namespace graft::train {
namespace {

constexpr const char* kArea = "graph";
constexpr int kPassesBefore = 2;  // without a graph

}  // namespace

PassGraph::PassGraph(AttachedAdapter adapter, const at::Device& device,
                     std::function<at::Tensor()> pass)
    : adapter_(std::move(adapter)),
      device_(device),
      pass_(std::move(pass)),
      parameters_(adapter_.parameters()) {
  const ops::DeviceKernels* kernels = ops::device_kernels();
  GRAFT_CHECK(kernels != nullptr && kernels->device_type() == device_.type(), kArea,
              "a graph needs a device that this build has kernels for; got ", device_.str());
  GRAFT_CHECK(adapter_.recipe().passes_are_alike(), kArea,
              "a method's passes must all do the same; got ", adapter_.recipe().method(),
              ", which decides something in each step");
}

PassGraph::~PassGraph() = default;

PassGraph::Counters PassGraph::counters() const {
  Counters values;
  for (const auto& layer : adapter_.layers()) values.push_back(layer.adapter->counters());
  return values;
}

void PassGraph::set_counters(const Counters& values) const {
  for (size_t i = 0; i < values.size(); ++i) adapter_.layers()[i].adapter->set_counters(values[i]);
}

void PassGraph::run_as_ever() {
  const Counters before = counters();
  result_ = pass_();
  advance_ = counters();
  for (size_t i = 0; i < before.size(); ++i)
    for (size_t k = 0; k < before[i].size(); ++k) {
      int64_t& moved = advance_[i][k];
      moved -= before[i][k];
      GRAFT_CHECK(moved == 0 || moved == 1, kArea,
                  "a layer must draw at most one mask in a pass; got ", moved, " (layer '",
                  adapter_.layers()[i].name, "')");
    }
}

// How many passes lie between the captured one and the next.
uint32_t PassGraph::later() const {
  const Counters now = counters();
  std::optional<int64_t> passes;
  for (size_t i = 0; i < now.size(); ++i)
    for (size_t k = 0; k < now[i].size(); ++k) {
      if (advance_[i][k] == 0) continue;
      const int64_t own = now[i][k] - captured_[i][k];
      GRAFT_CHECK(!passes || own == *passes, kArea,
                  "all layers must have drawn as many masks; got ", own, " and ", *passes,
                  " since the capture (layer '", adapter_.layers()[i].name, "')");
      passes = own;
    }
  return static_cast<uint32_t>(passes.value_or(0));
}

void PassGraph::capture() {
  captured_ = counters();
  graph_ = ops::device_kernels()->capture(device_, [this] {
    set_counters(captured_);
    result_ = pass_();
  });
  set_counters(captured_);  // nothing has run
}

// The graph adds to the gradients that it was captured with, wherever others were put meanwhile.
void PassGraph::keep_gradients() {
  const at::NoGradGuard no_grad;
  const bool first = gradients_.empty();
  std::vector<at::Tensor> dropped;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor present = parameters_[i].grad();
    if (first) gradients_.push_back(at::zeros_like(parameters_[i]));
    at::Tensor& kept = gradients_[i];
    if (present.is_same(kept)) continue;
    if (present.defined())
      kept.copy_(present);
    else if (!first)
      dropped.push_back(kept);
    parameters_[i].mutable_grad() = kept;
  }
  if (!dropped.empty()) at::_foreach_zero_(dropped);
}

at::Tensor PassGraph::run() {
  if (passes_ < kPassesBefore) {
    ++passes_;
    run_as_ever();
    return result_;
  }
  keep_gradients();
  if (!graph_) capture();
  const Counters before = counters();
  graph_->replay(later());
  Counters after = before;
  for (size_t i = 0; i < after.size(); ++i)
    for (size_t k = 0; k < after[i].size(); ++k) after[i][k] += advance_[i][k];
  set_counters(after);
  return result_;
}

}  // namespace graft::train
