#include <string>

#include "arguments.h"
#include "cuda_kernels.h"

namespace graft::ops {
namespace {

graft::cuda::FactorLayout layout_of(bool tall) {
  return tall ? graft::cuda::FactorLayout::columns_by_rank
              : graft::cuda::FactorLayout::rank_by_columns;
}

// Hidden matrices are read as whole vectors.
void check_hidden(const at::Tensor& hidden, int64_t rows, int64_t rank) {
  static_assert(hidden_columns(5) == graft::cuda::padded_rank(5) &&
                hidden_columns(9) == graft::cuda::padded_rank(9) &&
                hidden_columns(64) == graft::cuda::padded_rank(64));
  const int padded = graft::cuda::padded_rank(static_cast<int>(rank));
  GRAFT_CHECK(padded > 0, kCudaArea, "the rank must be in [1, 64]; got ", rank);
  GRAFT_CHECK(hidden.dim() == 2 && hidden.size(0) == rows && hidden.size(1) == padded &&
                  reinterpret_cast<uintptr_t>(hidden.const_data_ptr()) % 16 == 0,
              kCudaArea, "a hidden matrix must be [", rows, ", ", padded,
              "], aligned to 16 bytes; got ", hidden.sizes());
}

// S or dS, from x in its own type into `type`.
at::Tensor shrink(const Call& call, const at::Tensor& x, const at::Tensor& factor, bool tall,
                  int64_t rank, double scale, const Dropout& dropout, at::ScalarType type) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const int padded = graft::cuda::padded_rank(static_cast<int>(rank));
  GRAFT_CHECK(padded > 0, kCudaArea, "the rank must be in [1, 64]; got ", rank);
  const at::Tensor out = call.empty({rows, padded}, type),
                   space = call.workspace(
                       graft::cuda::lora_shrink_workspace(rows, columns, static_cast<int>(rank)));
  const bool to_fp32 = type == at::kFloat;
  call.check(graft::cuda::launch_lora_shrink({.type = element_type(x.scalar_type()),
                                              .x = pointer(x),
                                              .factor = pointer(factor),
                                              .layout = layout_of(tall),
                                              .rows = rows,
                                              .columns = columns,
                                              .rank = static_cast<int>(rank),
                                              .scale = static_cast<float>(scale),
                                              .dropout = dropout_mask(dropout),
                                              .out = to_fp32 ? nullptr : out.mutable_data_ptr(),
                                              .out_fp32 = to_fp32 ? own_floats(out) : nullptr,
                                              .workspace = own_floats(space)},
                                             call.stream()));
  return out;
}

}  // namespace

at::Tensor CudaKernels::lora_shrink(const at::Tensor& x_in, const LowRankFactor& factor,
                                    double scale, const Dropout& dropout) const {
  const Call call("lora_shrink", x_in);
  const auto type = x_in.scalar_type();
  const at::Tensor x = call.dense(x_in, type), V = call.dense(factor.values, type);
  call.check_sizes(x.dim() == 2 && V.dim() == 2 && factor.columns() == x.size(1), x, V);
  return shrink(call, x, V, factor.tall, factor.rank(), scale, dropout, type);
}

at::Tensor CudaKernels::lora_expand(const at::Tensor& hidden_in, const LowRankFactor& factor,
                                    double scale, const Dropout& dropout,
                                    const ExpandInto& into) const {
  const Call call("lora_expand", hidden_in);
  const auto type = hidden_in.scalar_type();
  const at::Tensor hidden = call.dense(hidden_in, type), V = call.dense(factor.values, type),
                   base = call.dense_or_none(into.base, type),
                   bias = call.dense_or_none(into.bias, type),
                   column_scale = call.dense_or_none(into.column_scale, at::kFloat);
  const int64_t rows = hidden.size(0), columns = factor.columns();
  check_hidden(hidden, rows, factor.rank());
  const auto is_matrix = [&](const at::Tensor& t) {
    return !t.defined() || (t.dim() == 2 && t.size(0) == rows && t.size(1) == columns);
  };
  const auto is_vector = [&](const at::Tensor& t) {
    return !t.defined() || (t.dim() == 1 && t.size(0) == columns);
  };
  call.check_sizes(is_matrix(base), base, V);
  call.check_sizes(is_matrix(into.unscaled), into.unscaled, V);
  call.check_sizes(is_vector(bias), bias, V);
  call.check_sizes(is_vector(column_scale), column_scale, V);
  // Written to in place: a copy would be lost.
  GRAFT_CHECK(!into.unscaled.defined() ||
                  (into.unscaled.is_contiguous() && into.unscaled.scalar_type() == type),
              kCudaArea, "what is written to must be contiguous and of one type (lora_expand)");
  const at::Tensor out = call.empty({rows, columns}, type);
  call.check(graft::cuda::launch_lora_expand(
      {.type = element_type(type),
       .hidden = pointer(hidden),
       .factor = pointer(V),
       .layout = layout_of(factor.tall),
       .rows = rows,
       .columns = columns,
       .rank = static_cast<int>(factor.rank()),
       .scale = static_cast<float>(scale),
       .dropout = dropout_mask(dropout),
       .base = pointer(base),
       .column_scale = floats(column_scale),
       .bias = pointer(bias),
       .unscaled = into.unscaled.defined() ? into.unscaled.mutable_data_ptr() : nullptr,
       .out = out.mutable_data_ptr()},
      call.stream()));
  return out;
}

at::Tensor CudaKernels::lora_outer(const at::Tensor& hidden_in, const at::Tensor& x_in,
                                   int64_t rank, bool tall, double scale,
                                   const Dropout& dropout) const {
  const Call call("lora_outer", x_in);
  const auto type = x_in.scalar_type();
  const at::Tensor x = call.dense(x_in, type), hidden = call.dense(hidden_in, type);
  check_hidden(hidden, x.size(0), rank);
  const int64_t rows = x.size(0), columns = x.size(1);
  const at::Tensor out = tall ? call.empty({columns, rank}, at::kFloat)
                              : call.empty({rank, columns}, at::kFloat),
                   space = call.workspace(
                       graft::cuda::lora_outer_workspace(rows, columns, static_cast<int>(rank)));
  if (rows == 0) return out.zero_();
  call.check(graft::cuda::launch_lora_outer({.type = element_type(type),
                                             .hidden = pointer(hidden),
                                             .x = pointer(x),
                                             .layout = layout_of(tall),
                                             .rows = rows,
                                             .columns = columns,
                                             .rank = static_cast<int>(rank),
                                             .scale = static_cast<float>(scale),
                                             .dropout = dropout_mask(dropout),
                                             .out = own_floats(out),
                                             .workspace = own_floats(space)},
                                            call.stream()));
  return out;
}

std::pair<at::Tensor, at::Tensor> CudaKernels::lora_backward(const at::Tensor& dy_in,
                                                             const at::Tensor& hidden_in,
                                                             const at::Tensor& B_in,
                                                             double scale) const {
  const Call call("lora_backward", dy_in);
  const auto type = dy_in.scalar_type();
  const at::Tensor dy = call.dense(dy_in, type), hidden = call.dense(hidden_in, type),
                   B = call.dense(B_in, type);
  call.check_sizes(dy.dim() == 2 && B.dim() == 2 && B.size(0) == dy.size(1), dy, B);
  const int64_t rows = dy.size(0), columns = dy.size(1), rank = B.size(1);
  check_hidden(hidden, rows, rank);
  const at::Tensor d_hidden = call.empty(hidden.sizes(), type),
                   dB = call.empty({columns, rank}, at::kFloat),
                   space = call.workspace(graft::cuda::lora_backward_workspace(
                       element_type(type), rows, columns, static_cast<int>(rank)));
  if (rows == 0) return {d_hidden, dB.zero_()};
  call.check(graft::cuda::launch_lora_backward({.type = element_type(type),
                                                .dy = pointer(dy),
                                                .hidden = pointer(hidden),
                                                .B = pointer(B),
                                                .rows = rows,
                                                .columns = columns,
                                                .rank = static_cast<int>(rank),
                                                .scale = static_cast<float>(scale),
                                                .d_hidden = d_hidden.mutable_data_ptr(),
                                                .dB = own_floats(dB),
                                                .workspace = own_floats(space)},
                                               call.stream()));
  return {d_hidden, dB};
}

at::Tensor CudaKernels::dora_norm(const at::Tensor& weight_in, const at::Tensor& squares_in,
                                  const at::Tensor& A_in, const at::Tensor& B_in,
                                  double scale) const {
  const Call call("dora_norm", weight_in);
  const auto type = weight_in.scalar_type();
  const at::Tensor weight = call.dense(weight_in, type), A = call.dense(A_in, type),
                   B = call.dense(B_in, type), squares = call.dense(squares_in, at::kDouble);
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = A.size(0);
  call.check_sizes(A.size(1) == columns && squares.numel() == rows, weight, A);
  call.check_sizes(B.size(0) == rows && B.size(1) == rank, weight, B);
  const at::Tensor product = shrink(call, weight, A, false, rank, 1.0, {}, at::kFloat),
                   gram = shrink(call, A, A, false, rank, 1.0, {}, at::kFloat);
  const at::Tensor norm = call.empty({rows}, at::kFloat), c = call.empty({rows}, at::kFloat),
                   ones = at::ones_like(norm);  // a magnitude: c is not asked for
  call.check(graft::cuda::launch_dora_norm({.type = element_type(type),
                                            .weight = pointer(weight),
                                            .squares = squares.const_data_ptr<double>(),
                                            .A = pointer(A),
                                            .B = pointer(B),
                                            .product = floats(product),
                                            .gram = floats(gram),
                                            .magnitude = floats(ones),
                                            .rows = rows,
                                            .columns = columns,
                                            .rank = static_cast<int>(rank),
                                            .scale = scale,
                                            .norm = own_floats(norm),
                                            .column_scale = own_floats(c)},
                                           call.stream()));
  return norm;
}

std::pair<at::Tensor, at::Tensor> CudaKernels::dora_backward(const at::Tensor& dy_in,
                                                             const at::Tensor& z_in,
                                                             const at::Tensor& scale_in,
                                                             const at::Tensor& norm_in) const {
  const Call call("dora_backward", dy_in);
  const auto type = dy_in.scalar_type();
  const at::Tensor dy = call.dense(dy_in, type), z = call.dense(z_in, type),
                   c = call.dense(scale_in, at::kFloat), norm = call.dense(norm_in, at::kFloat);
  const int64_t rows = dy.size(0), columns = dy.size(1);
  call.check_sizes(z.sizes() == dy.sizes(), z, dy);
  call.check_sizes(c.numel() == columns && norm.numel() == columns, c, dy);
  const at::Tensor dz = call.empty(dy.sizes(), type), dm = call.empty({columns}, at::kFloat),
                   space = call.workspace(graft::cuda::dora_backward_workspace(rows, columns));
  if (rows == 0) return {dz, dm.zero_()};
  call.check(graft::cuda::launch_dora_backward({.type = element_type(type),
                                                .dy = pointer(dy),
                                                .z = pointer(z),
                                                .column_scale = floats(c),
                                                .norm = floats(norm),
                                                .rows = rows,
                                                .columns = columns,
                                                .dz = dz.mutable_data_ptr(),
                                                .d_magnitude = own_floats(dm),
                                                .workspace = own_floats(space)},
                                               call.stream()));
  return {dz, dm};
}

}  // namespace graft::ops
