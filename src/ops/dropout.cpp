#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <graft/core/error.h>
#include <graft/ops/dropout.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "aten_rows.h"
#include "cuda_dispatch.h"
#include "dropout_rows.h"
#include "function_arguments.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

template <typename T>
void for_rows(at::Tensor& target, const at::Tensor& x, const Dropout& dropout,
              void (*row_function)(T*, const T*, int64_t, const RowMask&)) {
  const int64_t columns = x.dim() == 0 ? 1 : x.size(-1);
  if (x.numel() == 0) return;
  const int64_t rows = x.numel() / columns;
  T* out = target.mutable_data_ptr<T>();
  const T* in = x.const_data_ptr<T>();
  const uint32_t threshold = dropout.threshold();
  const double scale = dropout.scale();
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      row_function(out + row * columns, in + row * columns, columns,
                   {dropout.key, static_cast<uint32_t>(row), threshold, scale});
    }
  });
}

at::Tensor apply_dropout_on_cpu(const at::Tensor& x, const Dropout& dropout) {
  check_dropout(dropout.p, "dropout");
  if (!dropout.active()) return x;
  GRAFT_CHECK(x.is_cpu(), "dropout", "the input must be on the CPU; got ", x.device().str());
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble)
    return apply_dropout_on_cpu(x.to(at::kFloat), dropout).to(x.scalar_type());
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  if (x.scalar_type() == at::kFloat)
    for_rows<float>(out, in, dropout, mask_row);
  else
    for_rows<double>(out, in, dropout, mask_row);
  return out;
}

class DropoutFunction : public torch::autograd::Function<DropoutFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const Dropout& dropout) {
    save_dropout(ctx, dropout);
    return apply_dropout(x, dropout);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward("dropout");
    return {apply_dropout(grads[0], saved_dropout(ctx)), at::Tensor()};
  }
};

}  // namespace

uint32_t Dropout::threshold() const {
  return static_cast<uint32_t>(std::lround(65536.0 * p));
}

double Dropout::scale() const {
  return 65536.0 / (65536.0 - threshold());
}

void check_dropout(double p, const char* area, const std::string& place) {
  GRAFT_CHECK(p >= 0.0 && p < 1.0 && std::lround(65536.0 * p) < 65536, area,
              "dropout must be in [0, 1); got ", p, place.empty() ? "" : " (" + place + ")");
}

at::Tensor apply_dropout(const at::Tensor& x, const Dropout& dropout) {
  if (!dropout.active() || !on_device(x)) return apply_dropout_on_cpu(x, dropout);
  check_dropout(dropout.p, "dropout");
  const int64_t columns = x.dim() == 0 ? 1 : x.size(-1);
  const auto* kernels = kernels_for({.op = DeviceOp::dropout,
                                     .type = x.scalar_type(),
                                     .rows = columns == 0 ? 0 : x.numel() / columns,
                                     .columns = columns},
                                    x.device());
  return kernels != nullptr ? kernels->dropout(x, dropout) : aten::dropout(x, dropout);
}

void add_dropped_(at::Tensor& target, const at::Tensor& x, const Dropout& dropout) {
  GRAFT_CHECK(target.is_contiguous() && x.is_contiguous() && target.sizes() == x.sizes() &&
                  target.scalar_type() == x.scalar_type(),
              "dropout", "target and input must be contiguous and alike; got ", target.sizes(),
              " and ", x.sizes());
  if (on_device(x)) {
    target.add_(apply_dropout(x, dropout));
    return;
  }
  if (x.scalar_type() == at::kFloat)
    for_rows<float>(target, x, dropout, add_masked_row);
  else
    for_rows<double>(target, x, dropout, add_masked_row);
}

at::Tensor dropout(const at::Tensor& x, const Dropout& dropout) {
  check_dropout(dropout.p, "dropout");
  return dropout.active() ? DropoutFunction::apply(x, dropout) : x;
}

}  // namespace graft::ops
