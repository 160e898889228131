#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <graft/core/error.h>
#include <graft/core/simd.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/sparse_linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "cuda_dispatch.h"
#include "function_arguments.h"
#include "kept_rows.h"
#include "tensor_rows.h"
#include "vector_math.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

constexpr int64_t kTile = 64;   // tokens side by side in a tile
constexpr int64_t kParts = 16;  // partial sums over tokens, whatever the number of threads

// ---- Tiles: blocks of tokens with the tokens adjacent, [features][kTile] -----------------------

// Features in small groups: a group's lines of the tile stay in the first cache.
constexpr int64_t kGroup = 16;

// The tile of `tokens` rows [tokens, features]; zero beyond them.
template <class T>
void load_tile(T* tile, const T* rows, int64_t tokens, int64_t features) {
  if (tokens < kTile) std::fill(tile, tile + features * kTile, T(0));
  for (int64_t first = 0; first < features; first += kGroup) {
    const int64_t last = std::min(features, first + kGroup);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = first; i < last; ++i) tile[i * kTile + t] = rows[t * features + i];
  }
}

// rows += the tile's first tokens.
template <class T>
void add_tile(T* rows, const T* tile, int64_t tokens, int64_t features) {
  for (int64_t first = 0; first < features; first += kGroup) {
    const int64_t last = std::min(features, first + kGroup);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = first; i < last; ++i) rows[t * features + i] += tile[i * kTile + t];
  }
}

// out[to_q] += v_q in[from_q] for n entries.
template <class T>
GRAFT_INLINE void add_entries_body(T* out, const T* in, const int32_t* to, const int32_t* from,
                                   const T* values, int64_t n) {
  for (int64_t q = 0; q < n; ++q) {
    T* target = out + to[q] * kTile;
    const T *source = in + from[q] * kTile, value = values[q];
#pragma omp simd
    for (int64_t t = 0; t < kTile; ++t) target[t] += value * source[t];
  }
}

// sums_q += a[of_a_q] . b[of_b_q] for n entries.
template <class T>
GRAFT_INLINE void add_dots_body(T* sums, const T* a, const T* b, const int32_t* of_a,
                                const int32_t* of_b, int64_t n) {
  for (int64_t q = 0; q < n; ++q) {
    const T *left = a + of_a[q] * kTile, *right = b + of_b[q] * kTile;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < kTile; ++t) sum += left[t] * right[t];
    sums[q] += sum;
  }
}

#define GRAFT_ENTRY_LOOPS(T)                                                               \
  GRAFT_SIMD void add_entries(T* out, const T* in, const int32_t* to, const int32_t* from, \
                              const T* values, int64_t n) {                                \
    add_entries_body(out, in, to, from, values, n);                                        \
  }                                                                                        \
  GRAFT_SIMD void add_dots(T* sums, const T* a, const T* b, const int32_t* of_a,           \
                           const int32_t* of_b, int64_t n) {                               \
    add_dots_body(sums, a, b, of_a, of_b, n);                                              \
  }
GRAFT_ENTRY_LOOPS(float)
GRAFT_ENTRY_LOOPS(double)
#undef GRAFT_ENTRY_LOOPS

int64_t tiles_of(int64_t tokens) {
  return (tokens + kTile - 1) / kTile;
}

// ---- On a device: LibTorch's operators, with the update as a dense matrix ----------------------

// S [to, from], entries at one position added up (by sorting, not by atomic additions).
at::Tensor dense_entries(const at::Tensor& to, const at::Tensor& from, const at::Tensor& values,
                         int64_t rows, int64_t columns) {
  const at::Tensor places = to.to(at::kLong) * columns + from;
  return at::zeros({rows * columns}, values.options())
      .index_put_({places}, values, /*accumulate=*/true)
      .view({rows, columns});
}

bool computed_on_device(const at::Tensor& x) {
  if (!on_device(x)) return false;
  kernels_for({.op = DeviceOp::sparse, .type = x.scalar_type()}, x.device());  // counts
  return true;
}

// ---- Both --------------------------------------------------------------------------------------

// y += x S^T, or dx += dy S with the entries' rows and columns exchanged.  x: [tokens, in], y:
// [tokens, out], contiguous; to, from: int32 [K], features of y and of x.
void add_sparse_product_(const at::Tensor& y, const at::Tensor& x, const at::Tensor& to,
                         const at::Tensor& from, const at::Tensor& values) {
  if (computed_on_device(x)) {
    y.addmm_(x, dense_entries(to, from, values, y.size(1), x.size(1)).t());
    return;
  }
  const int64_t tokens = x.size(0), in = x.size(1), out = y.size(1), entries = values.numel();
  dispatch_float(values.scalar_type(), [&](auto zero) {
    using T = Compute<decltype(zero)>;
    const auto* targets = to.const_data_ptr<int32_t>();
    const auto* sources = from.const_data_ptr<int32_t>();
    const T *x_data = x.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    at::parallel_for(0, tiles_of(tokens), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> x_tile(in * kTile), y_tile(out * kTile);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kTile, count = std::min(kTile, tokens - first);
        load_tile(x_tile.data(), x_data + first * in, count, in);
        std::fill(y_tile.begin(), y_tile.end(), T(0));
        add_entries(y_tile.data(), x_tile.data(), targets, sources, v, entries);
        add_tile(y_data + first * out, y_tile.data(), count, out);
      }
    });
  });
}

// sum_t dy[t, row_q] x[t, column_q] for each entry.
at::Tensor value_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rows,
                          const at::Tensor& columns) {
  if (computed_on_device(x))
    return at::mm(dy.t(), x).view(-1).index_select(0, rows.to(at::kLong) * x.size(1) + columns);
  const int64_t tokens = x.size(0), in = x.size(1), out = dy.size(1), entries = rows.numel();
  const int64_t tiles = tiles_of(tokens), parts = std::min(kParts, tiles);
  const at::Tensor sums = at::zeros({parts, entries}, dy.options());
  dispatch_float(dy.scalar_type(), [&](auto zero) {
    using T = Compute<decltype(zero)>;
    const auto* of_dy = rows.const_data_ptr<int32_t>();
    const auto* of_x = columns.const_data_ptr<int32_t>();
    const T *dy_data = dy.const_data_ptr<T>(), *x_data = x.const_data_ptr<T>();
    T* sums_data = sums.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> dy_tile(out * kTile), x_tile(in * kTile);
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
          const int64_t first = tile * kTile, count = std::min(kTile, tokens - first);
          load_tile(dy_tile.data(), dy_data + first * out, count, out);
          load_tile(x_tile.data(), x_data + first * in, count, in);
          add_dots(sums_data + part * entries, dy_tile.data(), x_tile.data(), of_dy, of_x, entries);
        }
      }
    });
  });
  return sums.sum(0);
}

// ---- Checks ------------------------------------------------------------------------------------

// Positions as a dense int32 tensor whose numbers lie in [0, size).
void check_range(const at::Tensor& positions, int64_t size, const char* area, const char* what) {
  const auto* data = positions.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < positions.numel(); ++i)
    GRAFT_CHECK(data[i] >= 0 && data[i] < size, area, what, " must lie in [0, ", size, "); got ",
                data[i]);
}

void check_sparse(const at::Tensor& weight, const SparseTerm& term) {
  constexpr const char* kArea = "sparse";
  check_float(weight, kArea, "the weight");
  check_float(term.values, kArea, "the values");
  const at::Tensor& positions = term.positions;
  check_one_device(kArea, {weight, term.values, positions});
  GRAFT_CHECK(weight.dim() == 2 && positions.defined() && positions.scalar_type() == at::kInt &&
                  positions.dim() == 2 && positions.size(0) == 2 && term.values.dim() == 1 &&
                  positions.size(1) == term.values.size(0),
              kArea, "positions must be int32 [2, K] for K values of a weight [out, in]; got ",
              shape_of(positions), " for ", term.values.sizes(), " and ", weight.sizes());
  const auto type = term.values.scalar_type();
  GRAFT_CHECK(type == at::kFloat || type == at::kDouble, kArea,
              "the values must be float32 or float64; got ", at::toString(type));
  if (!positions.device().is_cpu()) return;  // LibTorch checks them there, without a wait
  check_range(positions[0].contiguous(), weight.size(0), kArea, "rows");
  check_range(positions[1].contiguous(), weight.size(1), kArea, "columns");
}

void check_input(const at::Tensor& x, const at::Tensor& weight, const char* area) {
  GRAFT_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), area,
              "the input's last dimension must match the weight [out, in]; got ", x.sizes(),
              " and ", weight.sizes());
}

// `rows` with the leading dimensions of `like`; not a view of what autograd sees, so that callers
// may add a bias in place.
at::Tensor shaped(const at::Tensor& rows, const at::Tensor& like) {
  std::vector<int64_t> shape = like.sizes().vec();
  shape.back() = rows.size(1);
  return at::_unsafe_view(rows.to(like.scalar_type()), shape);
}

// Which of the arguments want a gradient, as bits.
int64_t wanted_mask(std::initializer_list<const at::Tensor*> inputs) {
  int64_t mask = 0, i = 0;
  for (const at::Tensor* input : inputs)
    mask |= int64_t{input->defined() && input->requires_grad()} << i++;
  return mask;
}

// ---- The operations ----------------------------------------------------------------------------

// The arguments of both operations in their order, of which `backward` returns the gradients.
enum Input { kX, kWeight, kBias, kPositions, kValues, kScale, kInputs };

class SparseLinear : public torch::autograd::Function<SparseLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const Optional& base_bias, const at::Tensor& positions,
                            const at::Tensor& values, double scale) {
    const at::Tensor bias = base_bias.value_or(at::Tensor());
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    const at::Tensor y = frozen_product(rows, weight, bias).to(values.scalar_type()).contiguous();
    add_sparse_product_(y, rows.to(values.scalar_type()).contiguous(), positions[0], positions[1],
                        values * scale);
    const int64_t mask = wanted_mask({&x, &weight, &bias, &positions, &values});
    const bool needs_rows = (mask >> kValues & 1) != 0 || (mask >> kWeight & 1) != 0;
    ctx->save_for_backward({keep_rows(ctx, x, rows, needs_rows), weight, positions, values});
    ctx->saved_data["wanted"] = mask;
    ctx->saved_data["scale"] = scale;
    return shaped(y, x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("sparse");
    variable_list saved = ctx->get_saved_variables();
    saved[0] = kept_rows(ctx, saved[0]);
    const at::Tensor &rows = saved[0], &weight = saved[1], &positions = saved[2],
                     &values = saved[3];
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](Input input) { return (mask >> input & 1) != 0; };
    const double scale = ctx->saved_data["scale"].toDouble();
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const at::Tensor dy_master = dy.to(values.scalar_type()).contiguous();

    variable_list result(kInputs);
    if (wanted(kValues))
      result[kValues] = value_gradient(dy_master, rows.to(values.scalar_type()).contiguous(),
                                       positions[0], positions[1])
                            .mul_(scale);
    if (wanted(kX)) {
      const at::Tensor dx =
          frozen_product_backward(dy, weight).to(values.scalar_type()).contiguous();
      add_sparse_product_(dx, dy_master, positions[1], positions[0], values * scale);
      result[kX] = shaped(dx, grads[0]);
    }
    if (wanted(kWeight)) result[kWeight] = at::mm(dy.t(), rows).to(weight.scalar_type());
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    return result;
  }
};

class ColumnLinear : public torch::autograd::Function<ColumnLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const Optional& base_bias, const at::Tensor& columns,
                            const at::Tensor& D, double scale) {
    const at::Tensor bias = base_bias.value_or(at::Tensor());
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    const at::Tensor selected = rows.index_select(1, columns).to(D.scalar_type());
    const at::Tensor y = frozen_product(rows, weight, bias, {selected, (D * scale).t()});
    const int64_t mask = wanted_mask({&x, &weight, &bias, &columns, &D});
    const bool needs_rows = (mask >> kWeight & 1) != 0;
    ctx->save_for_backward({keep_rows(ctx, x, rows, needs_rows), selected, weight, columns, D});
    ctx->saved_data["wanted"] = mask;
    ctx->saved_data["scale"] = scale;
    return shaped(y, x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("columns");
    variable_list saved = ctx->get_saved_variables();
    saved[0] = kept_rows(ctx, saved[0]);
    const at::Tensor &rows = saved[0], &selected = saved[1], &weight = saved[2],
                     &columns = saved[3], &D = saved[4];
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](Input input) { return (mask >> input & 1) != 0; };
    const double scale = ctx->saved_data["scale"].toDouble();
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const at::Tensor dy_master = dy.to(D.scalar_type());

    variable_list result(kInputs);
    if (wanted(kValues))  // the long dimension last, where matrix libraries are fast
      result[kValues] = thin_product(selected.t(), dy_master.t()).mul_(scale).t();
    if (wanted(kX)) {
      const at::Tensor dx = frozen_product_backward(dy, weight).to(D.scalar_type());
      dx.index_add_(1, columns, thin_product(dy_master, D.t()), scale);
      result[kX] = shaped(dx, grads[0]);
    }
    if (wanted(kWeight)) result[kWeight] = at::mm(dy.t(), rows).to(weight.scalar_type());
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    return result;
  }
};

}  // namespace

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const SparseTerm& term) {
  check_float(x, "sparse", "the input");
  check_one_device("sparse", {x, weight});
  check_sparse(weight, term);
  check_input(x, weight, "sparse");
  return SparseLinear::apply(x, weight, optional(bias), term.positions.contiguous(),
                             term.values.contiguous(), term.scale);
}

at::Tensor add_sparse(const at::Tensor& weight, const SparseTerm& term) {
  check_sparse(weight, term);
  const at::NoGradGuard no_grad;
  const at::Tensor places =
      term.positions[0].to(at::kLong).mul_(weight.size(1)).add_(term.positions[1]);
  const auto type = term.values.scalar_type();
  return weight.detach()
      .reshape({-1})
      .to(type)
      .index_add(0, places, term.values.detach(), term.scale)
      .view(weight.sizes());
}

at::Tensor column_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const ColumnTerm& term) {
  constexpr const char* kArea = "columns";
  check_input(x, weight, kArea);
  const at::Tensor &columns = term.columns, &D = term.D;
  GRAFT_CHECK(columns.defined() && columns.scalar_type() == at::kInt && columns.dim() == 1 &&
                  D.defined() && D.dim() == 2 && D.size(0) == weight.size(0) &&
                  D.size(1) == columns.size(0),
              kArea, "columns must be int32 [r] and D [out, r] for a weight of ", weight.sizes(),
              "; got ", shape_of(columns), " and ", shape_of(D));
  GRAFT_CHECK(x.device() == weight.device() && x.device() == D.device(), kArea,
              "input, weight and adapter must be on one device; got ", x.device().str(), ", ",
              weight.device().str(), " and ", D.device().str());
  check_range(columns.cpu().contiguous(), weight.size(1), kArea, "columns");
  return ColumnLinear::apply(x, weight, optional(bias), columns.to(x.device()), D, term.scale);
}

}  // namespace graft::ops
