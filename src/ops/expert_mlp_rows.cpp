#include "expert_mlp_rows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

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

// Columns of a tile: a row's part of a matrix is 1 KiB of adjacent memory, and one expert's three
// factors of that width fit the first-level cache up to rank 8.
constexpr int64_t kTile = 256;

// A row's columns of a tile.
template <class T>
struct alignas(64) Row {
  T data[kTile];
};

// The experts' factors B [E, f, r]; of a tile with the columns side by side: [E][r][kTile].
template <class T>
struct Factor {
  Factor(const at::Tensor& B, double s)
      : numbers(B), f(B.size(1)), rank(B.size(2)), scale(static_cast<T>(s)) {}

  at::Tensor tile_like() const {
    return at::zeros({numbers.tensor.size(0), rank, kTile}, numbers.tensor.options());
  }
  // to = s B
  void read(T* to, const Tile& tile) const {
    each(tile, [&](T& number, int64_t at) { to[at] = scale * number; });
  }
  // B = s from
  void write(const T* from, const Tile& tile) const {
    each(tile, [&](T& number, int64_t at) { number = scale * from[at]; });
  }

  Numbers<T> numbers;
  int64_t f, rank;
  T scale;

 private:
  // Calls op(number of B, its place in the tile).
  template <class Op>
  void each(const Tile& tile, const Op& op) const {
    for (int64_t e = 0; e < numbers.tensor.size(0); ++e) {
      T* B = numbers.data + (e * f + tile.first) * rank;
      for (int64_t j = 0; j < tile.columns; ++j)
        for (int64_t k = 0; k < rank; ++k) op(B[j * rank + k], (e * rank + k) * kTile + j);
    }
  }
};

// Tokens that are worked on together: a tile of their products, of v and of the gradients stays in
// the second-level cache while each of a token's rows, which lie with their experts', comes by.
constexpr int64_t kStretch = 128;

// Rows of one expert (-1: none) that lie side by side, their tokens in one stretch.
struct Run {
  int64_t expert, first, rows;
};

// The runs of each stretch, the experts in order.
std::vector<std::vector<Run>> runs_by_stretch(const ExpertRows& rows) {
  std::vector<std::vector<Run>> stretches((rows.tokens() + kStretch - 1) / kStretch);
  const int64_t* token = rows.token.const_data_ptr<int64_t>();
  const auto split = [&](int64_t expert, int64_t first, int64_t count) {
    for (int64_t m = first, end; m < first + count; m = end) {
      const int64_t stretch = token[m] / kStretch;
      end = m + 1;
      while (end < first + count && token[end] / kStretch == stretch) ++end;
      stretches[stretch].push_back({expert, m, end - m});
    }
  };
  for_experts(rows, split);
  if (rows.routed() < rows.rows()) split(-1, rows.routed(), rows.rows() - rows.routed());
  return stretches;
}

// The loops for factors of type T over products stored as Stored.
template <class T, class Stored>
class Loops {
 public:
  Loops(const GatedRows& in, const ExpertRows& rows)
      : rows_(rows),
        stretches_(runs_by_stretch(rows)),
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
    const at::Tensor summed = at::empty({rows_.tokens(), f_}, options),
                     hidden = at::zeros({tile_count(f_, kTile), rows_.rows(), down_rank_}, options);
    for_tiles(f_, kTile, rows_.rows(), [&](const Tile& tile) {
      forward_tile(tile, summed.mutable_data_ptr<T>(), hidden.mutable_data_ptr<T>());
    });
    return {summed, sum_tiles(hidden)};
  }

  GatedGradients backward(const at::Tensor& v_in, const at::Tensor& dS_in) const {
    const Numbers<T> v(v_in), dS(dS_in);
    const auto options = weights_.tensor.options();
    const int64_t M = rows_.rows(), tiles = tile_count(f_, kTile);
    GatedGradients to{at::empty({rows_.tokens(), f_}, options),
                      at::empty({rows_.tokens(), f_}, options),
                      at::zeros({tiles, M, gate_B_.rank}, options),
                      at::zeros({tiles, M, up_B_.rank}, options),
                      at::empty_like(gate_B_.numbers.tensor),
                      at::empty_like(up_B_.numbers.tensor),
                      at::zeros_like(down_A_.tensor),
                      at::zeros({tiles, M}, options)};
    for_tiles(f_, kTile, M, [&](const Tile& tile) { backward_tile(tile, v.data, dS.data, to); });
    to.gate_hidden = sum_tiles(to.gate_hidden);
    to.up_hidden = sum_tiles(to.up_hidden);
    to.weights = sum_tiles(to.weights);
    return to;
  }

 private:
  // Asks for the tile's columns of that stretch of tokens, which are far apart in memory.
  template <class Any>
  void fetch(const Any* from, size_t stretch, const Tile& tile) const {
    const int64_t first = static_cast<int64_t>(stretch) * kStretch,
                  end = std::min(first + kStretch, rows_.tokens());
    constexpr int64_t kLine = 64 / sizeof(Any);
    for (int64_t t = first; t < end; ++t)
      for (int64_t j = 0; j < tile.columns; j += kLine)
        __builtin_prefetch(from + t * f_ + tile.first + j, 0, 2);
  }

  // Zeros in the tile's columns of that stretch of tokens.
  void clear(T* target, size_t stretch, const Tile& tile) const {
    const int64_t first = static_cast<int64_t>(stretch) * kStretch,
                  end = std::min(first + kStretch, rows_.tokens());
    for (int64_t t = first; t < end; ++t)
      std::fill_n(target + t * f_ + tile.first, tile.columns, T{0});
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
    if (factor != nullptr)
      products_onto(h, from, hidden.data + m * rank, factor, kTile, rank, tile.columns);
    else
      for (int64_t j = 0; j < tile.columns; ++j) h[j] = load(from[j]);
  }

  // A tile of an expert's factor, or null for rows without expert.
  static T* of_expert(const Numbers<T>& tile_factor, int64_t expert) {
    return expert < 0 ? nullptr : tile_factor.data + expert * tile_factor.tensor.stride(0);
  }

  void forward_tile(const Tile& tile, T* summed, T* hidden) const {
    const Numbers<T> gate_B(gate_B_.tile_like()), up_B(up_B_.tile_like());
    gate_B_.read(gate_B.data, tile);
    up_B_.read(up_B.data, tile);
    Row<T> h1, h3, z;
    const int64_t n = tile.columns;
    const auto row = [&](int64_t m, int64_t e) {
      make_row(h1.data, gate_, gate_hidden_, of_expert(gate_B, e), gate_B_.rank, m, tile);
      make_row(h3.data, up_, up_hidden_, of_expert(up_B, e), up_B_.rank, m, tile);
      swiglu_row(h1.data, h3.data, z.data, n);
      add_scaled(summed + token_[m] * f_ + tile.first, z.data, weights_.data[m], n);
      if (e < 0) return;
      if (dropout_.active()) mask_row(z.data, z.data, n, mask_at(m, tile));
      products(hidden + (tile.index * rows_.rows() + m) * down_rank_, z.data, down_factor(e, tile),
               f_, down_rank_, n);
    };
    for (size_t i = 0; i < stretches_.size(); ++i) {
      fetch(gate_.data, i, tile);
      fetch(up_.data, i, tile);
      clear(summed, i, tile);
      for (const Run& run : stretches_[i])
        for (int64_t m = run.first; m < run.first + run.rows; ++m) row(m, run.expert);
    }
  }

  // What one thread works with: the factors of a tile, their gradients, and a few rows.
  struct Work {
    Work(const Loops& loops, const Tile& tile)
        : gate_B(loops.gate_B_.tile_like()),
          up_B(loops.up_B_.tile_like()),
          gate_dB(loops.gate_B_.tile_like()),
          up_dB(loops.up_B_.tile_like()) {
      loops.gate_B_.read(gate_B.data, tile);
      loops.up_B_.read(up_B.data, tile);
    }
    Numbers<T> gate_B, up_B, gate_dB, up_dB;
    Row<T> h1, h3, dz, through, z[kOuterRows], dh1[kOuterRows], dh3[kOuterRows];
  };

  // dh1, dh3 and drop(z) of row m as the `place`-th of the rows at hand, and its <z, v>.
  T row_backward(Work& work, int64_t place, int64_t m, int64_t e, const Tile& tile, const T* v,
                 const T* dS) const {
    const int64_t n = tile.columns;
    const bool has_terms = e >= 0;
    T* z = work.z[place].data;
    make_row(work.h1.data, gate_, gate_hidden_, of_expert(work.gate_B, e), gate_B_.rank, m, tile);
    make_row(work.h3.data, up_, up_hidden_, of_expert(work.up_B, e), up_B_.rank, m, tile);
    swiglu_row(work.h1.data, work.h3.data, z, n);
    const T weight_gradient = dot(z, v, n);
    scaled(work.dz.data, v, weights_.data[m], n);
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

  // Up to kOuterRows rows of one expert, from m on.
  void some_rows_backward(Work& work, int64_t m, int64_t some, int64_t e, const Tile& tile,
                          const T* v, const T* dS, const GatedGradients& to) const {
    const int64_t n = tile.columns, M = rows_.rows();
    T *gate = to.gate.data_ptr<T>(), *up = to.up.data_ptr<T>(),
      *U1 = to.gate_hidden.data_ptr<T>() + tile.index * M * gate_B_.rank,
      *U3 = to.up_hidden.data_ptr<T>() + tile.index * M * up_B_.rank,
      *dw = to.weights.data_ptr<T>() + tile.index * M;
    for (int64_t i = 0; i < some; ++i) {
      const int64_t at = token_[m + i] * f_ + tile.first;
      dw[m + i] = row_backward(work, i, m + i, e, tile, v + at, dS);
      add_scaled(gate + at, work.dh1[i].data, T{1}, n);
      add_scaled(up + at, work.dh3[i].data, T{1}, n);
      if (e < 0) continue;
      products(U1 + (m + i) * gate_B_.rank, work.dh1[i].data, of_expert(work.gate_B, e), kTile,
               gate_B_.rank, n);
      products(U3 + (m + i) * up_B_.rank, work.dh3[i].data, of_expert(work.up_B, e), kTile,
               up_B_.rank, n);
    }
    if (e < 0) return;
    add_outer(of_expert(work.gate_dB, e), kTile, gate_hidden_.data + m * gate_B_.rank,
              work.dh1[0].data, kTile, some, gate_B_.rank, n);
    add_outer(of_expert(work.up_dB, e), kTile, up_hidden_.data + m * up_B_.rank, work.dh3[0].data,
              kTile, some, up_B_.rank, n);
    add_outer(to.down_A.data_ptr<T>() + e * down_rank_ * f_ + tile.first, f_, dS + m * down_rank_,
              work.z[0].data, kTile, some, down_rank_, n);
  }

  void backward_tile(const Tile& tile, const T* v, const T* dS, const GatedGradients& to) const {
    Work work(*this, tile);
    for (size_t i = 0; i < stretches_.size(); ++i) {
      fetch(gate_.data, i, tile);
      fetch(up_.data, i, tile);
      fetch(v, i, tile);
      clear(to.gate.data_ptr<T>(), i, tile);
      clear(to.up.data_ptr<T>(), i, tile);
      for (const auto& [e, first, count] : stretches_[i])
        for (int64_t m = first; m < first + count; m += kOuterRows)
          some_rows_backward(work, m, std::min(kOuterRows, first + count - m), e, tile, v, dS, to);
    }
    Factor<T>(to.gate_B, gate_B_.scale).write(work.gate_dB.data, tile);
    Factor<T>(to.up_B, up_B_.scale).write(work.up_dB.data, tile);
  }

  const ExpertRows& rows_;
  const std::vector<std::vector<Run>> stretches_;
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
