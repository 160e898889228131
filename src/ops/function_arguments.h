// What autograd functions take and keep besides plain tensors.
#pragma once

#include <graft/ops/dropout.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>

namespace graft::ops {

// An undefined tensor is no valid argument of a Function; an empty optional is.
inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// A dropout mask's key among the saved data of a function; `name` tells the masks of one function
// apart.
inline void save_dropout(torch::autograd::AutogradContext* ctx, const Dropout& dropout,
                         const std::string& name = "") {
  ctx->saved_data[name + "p"] = dropout.p;
  if (!dropout.active()) return;
  ctx->saved_data[name + "seed"] = static_cast<int64_t>(dropout.key.seed);
  ctx->saved_data[name + "site"] = static_cast<int64_t>(dropout.key.site);
  ctx->saved_data[name + "step"] = static_cast<int64_t>(dropout.key.step);
}

inline Dropout saved_dropout(torch::autograd::AutogradContext* ctx, const std::string& name = "") {
  Dropout dropout{ctx->saved_data[name + "p"].toDouble(), {}};
  if (dropout.active()) {
    dropout.key = {static_cast<uint64_t>(ctx->saved_data[name + "seed"].toInt()),
                   static_cast<uint32_t>(ctx->saved_data[name + "site"].toInt()),
                   static_cast<uint32_t>(ctx->saved_data[name + "step"].toInt())};
  }
  return dropout;
}

}  // namespace graft::ops
