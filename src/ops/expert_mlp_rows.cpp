#include "expert_mlp_rows.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "cuda_dispatch.h"
#include "expert_kernels.h"
#include "expert_terms.h"
#include "swiglu_rows.h"
#include "vector_math.h"

namespace graft::ops {
namespace {

// [tiles, ...] summed over the tiles.
at::Tensor sum_tiles(const at::Tensor& parts) {
  at::Tensor sum = at::zeros(parts.sizes().slice(1), parts.options());
  for (int64_t i = 0; i < parts.size(0); ++i) sum.add_(parts[i]);
  return sum;
}

// A contiguous tensor and its numbers.
template <class T>
struct Numbers {
  explicit Numbers(const at::Tensor& t)
      : tensor(t.detach().contiguous()), data(tensor.data_ptr<T>()) {}
  at::Tensor tensor;
  T* data;
};

// A row's columns of a tile.
template <class T>
struct alignas(64) Row {
  T data[kTile];
};

// The experts' factors B [E, f, r], by tiles with their columns side by side: [r][kTile].
template <class T>
struct Factor {
  Factor(const at::Tensor& B, double s)
      : numbers(B), f(B.size(1)), rank(B.size(2)), scale(static_cast<T>(s)) {}

  at::Tensor tile_like() const { return at::zeros({rank, kTile}, numbers.tensor.options()); }
  // to = s B_e
  void read(T* to, int64_t expert, const Tile& tile) const {
    const T* from = numbers.data + (expert * f + tile.first) * rank;
    for (int64_t j = 0; j < tile.columns; ++j)
      for (int64_t k = 0; k < rank; ++k) to[k * kTile + j] = scale * from[j * rank + k];
  }
  // B_e = s from
  void write(const T* from, int64_t expert, const Tile& tile) const {
    T* to = numbers.data + (expert * f + tile.first) * rank;
    for (int64_t j = 0; j < tile.columns; ++j)
      for (int64_t k = 0; k < rank; ++k) to[j * rank + k] = scale * from[k * kTile + j];
  }

  Numbers<T> numbers;
  int64_t f, rank;
  T scale;
};

// The loops for factors of type T over products stored as Stored.
template <class T, class Stored>
class Loops {
 public:
  Loops(const GatedRows& in, const ExpertRows& rows)
      : rows_(rows),
        token_(rows.token.const_data_ptr<int64_t>()),
        f_(in.gate.size(1)),
        dropout_(in.down_term.dropout),
        gate_(in.gate),
        up_(in.up),
        gate_hidden_(in.gate_hidden),
        up_hidden_(in.up_hidden),
        weights_(in.weights),
        gate_B_(in.gate_term.B, in.gate_term.scale),
        up_B_(in.up_term.B, in.up_term.scale),
        down_A_(in.down_term.A),
        down_rank_(in.down_term.A.size(1)) {}

  ActivatedRows forward() const {
    const auto options = weights_.tensor.options();
    const at::Tensor summed = at::zeros({rows_.tokens(), f_}, options),
                     hidden = at::zeros({tile_count(f_), rows_.rows(), down_rank_}, options);
    for_tiles(f_, rows_.rows(), [&](const Tile& tile) {
      forward_tile(tile, summed.mutable_data_ptr<T>(), hidden.mutable_data_ptr<T>());
    });
    return {summed, sum_tiles(hidden)};
  }

  GatedGradients backward(const at::Tensor& v_in, const at::Tensor& dS_in) const {
    const Numbers<T> v(v_in), dS(dS_in);
    const auto options = weights_.tensor.options();
    const int64_t M = rows_.rows(), tiles = tile_count(f_);
    const auto zeros_like = [](const Numbers<T>& n) { return at::zeros_like(n.tensor); };
    GatedGradients to{at::zeros({rows_.tokens(), f_}, options),
                      at::zeros({rows_.tokens(), f_}, options),
                      at::zeros({tiles, M, gate_B_.rank}, options),
                      at::zeros({tiles, M, up_B_.rank}, options),
                      zeros_like(gate_B_.numbers),
                      zeros_like(up_B_.numbers),
                      zeros_like(down_A_),
                      at::zeros({tiles, M}, options)};
    for_tiles(f_, M, [&](const Tile& tile) { backward_tile(tile, v.data, dS.data, to); });
    to.gate_hidden = sum_tiles(to.gate_hidden);
    to.up_hidden = sum_tiles(to.up_hidden);
    to.weights = sum_tiles(to.weights);
    return to;
  }

 private:
  // Calls f(expert, first row, rows): the experts, then -1 for the rows without one.
  template <class F>
  void for_groups(const F& f) const {
    for_experts(rows_, f);
    if (const int64_t routed = rows_.routed(); routed < rows_.rows())
      f(int64_t{-1}, routed, rows_.rows() - routed);
  }

  const T* down_factor(int64_t expert, const Tile& tile) const {
    return down_A_.data + expert * down_rank_ * f_ + tile.first;
  }

  RowMask mask_at(int64_t m, const Tile& tile) const {
    return mask_of(rows_, m, dropout_, tile.first);
  }

  // h = product + s S B^T of row m; `factor` null: without the term.
  void make_row(T* h, const Numbers<Stored>& product, const Numbers<T>& hidden, const T* factor,
                int64_t rank, int64_t m, const Tile& tile) const {
    const Stored* from = product.data + token_[m] * f_ + tile.first;
    for (int64_t j = 0; j < tile.columns; ++j) h[j] = load(from[j]);
    if (factor != nullptr)
      add_products(h, hidden.data + m * rank, factor, kTile, rank, tile.columns);
  }

  void forward_tile(const Tile& tile, T* summed, T* hidden) const {
    const Numbers<T> gate_B(gate_B_.tile_like()), up_B(up_B_.tile_like());
    Row<T> h1, h3, z;
    const int64_t n = tile.columns;
    for_groups([&](int64_t e, int64_t first, int64_t count) {
      const bool has_terms = e >= 0;
      if (has_terms) {
        gate_B_.read(gate_B.data, e, tile);
        up_B_.read(up_B.data, e, tile);
      }
      for (int64_t m = first; m < first + count; ++m) {
        make_row(h1.data, gate_, gate_hidden_, has_terms ? gate_B.data : nullptr, gate_B_.rank, m,
                 tile);
        make_row(h3.data, up_, up_hidden_, has_terms ? up_B.data : nullptr, up_B_.rank, m, tile);
        swiglu_row(h1.data, h3.data, z.data, n);
        add_scaled(summed + token_[m] * f_ + tile.first, z.data, weights_.data[m], n);
        if (!has_terms) continue;
        if (dropout_.active()) mask_row(z.data, z.data, n, mask_at(m, tile));
        products(hidden + (tile.index * rows_.rows() + m) * down_rank_, z.data,
                 down_factor(e, tile), f_, down_rank_, n);
      }
    });
  }

  // What one thread works with: the factors of a tile, their gradients, and a few rows.
  struct Work {
    explicit Work(const Loops& loops)
        : gate_B(loops.gate_B_.tile_like()),
          up_B(loops.up_B_.tile_like()),
          gate_dB(loops.gate_B_.tile_like()),
          up_dB(loops.up_B_.tile_like()) {}
    Numbers<T> gate_B, up_B, gate_dB, up_dB;
    Row<T> h1, h3, dz, through, z[kOuterRows], dh1[kOuterRows], dh3[kOuterRows];
  };

  // dh1, dh3 and drop(z) of row m as the `place`-th of the rows at hand, and its <z, v>.
  T row_backward(Work& work, int64_t place, int64_t m, int64_t e, const Tile& tile, const T* v,
                 const T* dS) const {
    const int64_t n = tile.columns;
    const bool has_terms = e >= 0;
    T* z = work.z[place].data;
    make_row(work.h1.data, gate_, gate_hidden_, has_terms ? work.gate_B.data : nullptr,
             gate_B_.rank, m, tile);
    make_row(work.h3.data, up_, up_hidden_, has_terms ? work.up_B.data : nullptr, up_B_.rank, m,
             tile);
    swiglu_row(work.h1.data, work.h3.data, z, n);
    const T weight_gradient = dot(z, v, n);
    std::fill_n(work.dz.data, n, T{0});
    add_scaled(work.dz.data, v, weights_.data[m], n);
    if (has_terms && dropout_.active()) {
      std::fill_n(work.through.data, n, T{0});
      add_products(work.through.data, dS + m * down_rank_, down_factor(e, tile), f_, down_rank_, n);
      add_masked_row(work.dz.data, work.through.data, n, mask_at(m, tile));
      mask_row(z, z, n, mask_at(m, tile));
    } else if (has_terms) {
      add_products(work.dz.data, dS + m * down_rank_, down_factor(e, tile), f_, down_rank_, n);
    }
    swiglu_row_backward(work.h1.data, work.h3.data, work.dz.data, work.dh1[place].data,
                        work.dh3[place].data, n);
    return weight_gradient;
  }

  void backward_tile(const Tile& tile, const T* v, const T* dS, const GatedGradients& to) const {
    Work work(*this);
    const int64_t n = tile.columns, M = rows_.rows();
    T *gate = to.gate.data_ptr<T>(), *up = to.up.data_ptr<T>(),
      *U1 = to.gate_hidden.data_ptr<T>() + tile.index * M * gate_B_.rank,
      *U3 = to.up_hidden.data_ptr<T>() + tile.index * M * up_B_.rank,
      *dw = to.weights.data_ptr<T>() + tile.index * M, *dA = to.down_A.data_ptr<T>();
    for_groups([&](int64_t e, int64_t first, int64_t count) {
      if (e >= 0) begin_expert(work, e, tile);
      for (int64_t m = first; m < first + count; m += kOuterRows) {
        const int64_t some = std::min(kOuterRows, first + count - m);
        for (int64_t i = 0; i < some; ++i) {
          const int64_t at = token_[m + i] * f_ + tile.first;
          dw[m + i] = row_backward(work, i, m + i, e, tile, v + at, dS);
          add_scaled(gate + at, work.dh1[i].data, T{1}, n);
          add_scaled(up + at, work.dh3[i].data, T{1}, n);
          if (e < 0) continue;
          products(U1 + (m + i) * gate_B_.rank, work.dh1[i].data, work.gate_B.data, kTile,
                   gate_B_.rank, n);
          products(U3 + (m + i) * up_B_.rank, work.dh3[i].data, work.up_B.data, kTile, up_B_.rank,
                   n);
        }
        if (e < 0) continue;
        add_outer(work.gate_dB.data, kTile, gate_hidden_.data + m * gate_B_.rank, work.dh1[0].data,
                  kTile, some, gate_B_.rank, n);
        add_outer(work.up_dB.data, kTile, up_hidden_.data + m * up_B_.rank, work.dh3[0].data, kTile,
                  some, up_B_.rank, n);
        add_outer(dA + e * down_rank_ * f_ + tile.first, f_, dS + m * down_rank_, work.z[0].data,
                  kTile, some, down_rank_, n);
      }
      if (e < 0) return;
      Factor<T>(to.gate_B, gate_B_.scale).write(work.gate_dB.data, e, tile);
      Factor<T>(to.up_B, up_B_.scale).write(work.up_dB.data, e, tile);
    });
  }

  void begin_expert(Work& work, int64_t e, const Tile& tile) const {
    gate_B_.read(work.gate_B.data, e, tile);
    up_B_.read(work.up_B.data, e, tile);
    std::fill_n(work.gate_dB.data, gate_B_.rank * kTile, T{0});
    std::fill_n(work.up_dB.data, up_B_.rank * kTile, T{0});
  }

  const ExpertRows& rows_;
  const int64_t *token_, f_;
  const Dropout dropout_;
  const Numbers<Stored> gate_, up_;
  const Numbers<T> gate_hidden_, up_hidden_, weights_;
  const Factor<T> gate_B_, up_B_;
  const Numbers<T> down_A_;
  const int64_t down_rank_;
};

// Calls f with the loops for these types.
template <class F>
auto with_loops(GatedRows in, const ExpertRows& rows, const F& f) {
  const auto type = in.weights.scalar_type();
  if (type == at::kFloat && in.gate.scalar_type() == at::kBFloat16)
    return f(Loops<float, at::BFloat16>(in, rows));
  in.gate = in.gate.to(type);
  in.up = in.up.to(type);
  if (type == at::kDouble) return f(Loops<double, double>(in, rows));
  return f(Loops<float, float>(in, rows));
}

}  // namespace

ActivatedRows gated_rows(const GatedRows& in, const ExpertRows& rows) {
  if (on_device(in.gate)) return device::gated_rows(in, rows);
  return with_loops(in, rows, [](const auto& loops) { return loops.forward(); });
}

GatedGradients gated_rows_backward(const GatedRows& in, const at::Tensor& v, const at::Tensor& dS,
                                   const ExpertRows& rows) {
  if (on_device(in.gate)) return device::gated_rows_backward(in, v, dS, rows);
  return with_loops(in, rows, [&](const auto& loops) { return loops.backward(v, dS); });
}

}  // namespace graft::ops
