// What a training loop asks of an attached adapter around each step.
#include <graft/attach/attach.h>

#include "state.h"

namespace graft {
namespace {

adapters::AdapterList adapters_of(const AttachedAdapter::State& state) {
  adapters::AdapterList list;
  for (const auto& layer : state.layers) list.push_back(layer.adapter);
  return list;
}

}  // namespace

void AttachedAdapter::begin_step(const adapters::StepInfo& info) const {
  recipe().begin_step(adapters_of(*state_), info);
}

at::Tensor AttachedAdapter::penalty() const {
  return recipe().penalty(adapters_of(*state_));
}

void AttachedAdapter::before_update(const adapters::StepInfo& info) const {
  recipe().before_update(adapters_of(*state_), info);
}

void AttachedAdapter::end_step(const adapters::StepInfo& info) const {
  recipe().end_step(adapters_of(*state_), info);
}

adapters::Figures AttachedAdapter::figures() const {
  return recipe().figures(adapters_of(*state_));
}

adapters::ExpertUse AttachedAdapter::expert_use(bool training) const {
  return recipe().expert_use(adapters_of(*state_), training);
}

}  // namespace graft
