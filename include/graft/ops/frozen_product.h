/// Products with a frozen weight, on the fastest exact path of this machine.
///
/// LibTorch carries two fp32 matrix libraries, MKL and oneDNN, and graft has a product of its own
/// for frozen weights, which also adds an adapter's low-rank product in the same pass. Which is the
/// fastest depends on the processor (oneDNN on AMD with AVX-512, graft's on AMD with AVX2), so the
/// first call times small products of each and keeps the winner. All compute in true fp32; they may
/// differ in the last bits, hence the choice can be fixed: by `set_product_library` or by the
/// environment variable GRAFT_PRODUCTS=mkl|onednn|graft. Nothing else in graft multiplies by a
/// frozen weight. On a device all products are LibTorch's, fp32 ones in fp32 unless the program has
/// allowed TF32.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

namespace graft::ops {

/// Which library multiplies fp32 matrices on the CPU.
enum class ProductLibrary { mkl, onednn, graft };

/// The library in use; decides by measurement on the first call unless it was set.
ProductLibrary product_library();

/// Fixes the library for the whole process; throws when this machine does not have it.
void set_product_library(ProductLibrary library);

/// Its name, and how it was chosen: "onednn (measured: 2.13 times mkl)".
std::string describe_product_library();

/// "mkl", "onednn" or "graft".
std::string_view product_library_name(ProductLibrary library);

/// The library of that name; throws on any other.
ProductLibrary parse_product_library(std::string_view name);

/// A low-rank product to be added to a frozen one; undefined factors add nothing.
struct LowRankTerm {
  at::Tensor left = {};   ///< [m, r]
  at::Tensor right = {};  ///< [r, columns], strided as it comes
};

/// x W^T (+ bias) (+ left right).  x: [m, k], weight: [n, k], bias: [n] or undefined, the term's
/// right factor [r, n]; returns [m, n]. The result has x's dtype, with a term the term's (the
/// product's own rounding comes first). A weight of another dtype than x is converted for the
/// product. Records nothing for autograd.
at::Tensor frozen_product(const at::Tensor& x, const at::Tensor& weight,
                          const at::Tensor& bias = {}, const LowRankTerm& term = {});

/// The same without bias and term, written into y [m, n] of x's dtype, whose rows may be apart.
void frozen_product_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight);

/// dY W (+ left right), the gradient of `frozen_product` with respect to x.  dy: [m, n], weight:
/// [n, k], the term's right factor [r, k]; returns [m, k], typed as above.
at::Tensor frozen_product_backward(const at::Tensor& dy, const at::Tensor& weight,
                                   const LowRankTerm& term = {});

/// y += x W^T and dx += dY W in place, where what is added to stands there first; typed as x and
/// dY.
void add_frozen_product(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight);
void add_frozen_product_backward(const at::Tensor& dx, const at::Tensor& dy,
                                 const at::Tensor& weight);

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
