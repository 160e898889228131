/// Products with a frozen weight, on the fastest exact path of this machine.
///
/// LibTorch carries two fp32 matrix libraries, MKL and oneDNN. Which is faster depends on the
/// processor (oneDNN is more than twice as fast on AMD with AVX-512, level elsewhere), so the first
/// call times one small product of each kind and keeps the winner. Both compute in true fp32; they
/// may differ in the last bits, hence the choice can be fixed: by `set_product_library` or by the
/// environment variable GRAFT_PRODUCTS=mkl|onednn. Nothing else in graft multiplies by a frozen
/// weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

namespace graft::ops {

/// Which library multiplies fp32 matrices on the CPU.
enum class ProductLibrary { mkl, onednn };

/// The library in use; decides by measurement on the first call unless it was set.
ProductLibrary product_library();

/// Fixes the library for the whole process.
void set_product_library(ProductLibrary library);

/// "mkl" or "onednn", and how it was chosen: "onednn (measured: 2.13 times mkl)".
std::string describe_product_library();

/// The library of that name; throws on any other.
ProductLibrary parse_product_library(std::string_view name);

/// x W^T (+ bias).  x: [m, k], weight: [n, k], bias: [n] or undefined; returns [m, n] in x's dtype.
/// A weight of another dtype than x is converted for the product. Records nothing for autograd.
at::Tensor frozen_product(const at::Tensor& x, const at::Tensor& weight,
                          const at::Tensor& bias = {});

/// dY W, the gradient of `frozen_product` with respect to x.  dy: [m, n], weight: [n, k]; returns
/// [m, k].
at::Tensor frozen_product_backward(const at::Tensor& dy, const at::Tensor& weight);

/// a b^T where one of the three sizes is a small rank.  a: [m, k], b: [n, k], strided as they come;
/// returns [m, n]. fp32 goes to oneDNN where LibTorch has it, whichever library multiplies the
/// frozen weights: it is two to five times as fast as MKL for these shapes. Records nothing for
/// autograd.
at::Tensor thin_product(const at::Tensor& a, const at::Tensor& b);

/// y = x W^T + b for a weight that is not trained, differentiable in x alone; saves nothing but the
/// weight. x: [..., k]; returns [..., n].
at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias = {});

}  // namespace graft::ops
