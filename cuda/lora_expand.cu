// Expand: y = b + c * (base + mask / (1 - p) * scale * S V), from r columns to wide rows.
//
// Bound by writing y (and reading base): S and V are small and come from caches. A warp multiplies
// 16 rows by 32 columns at a time, passes the sums through shared memory, and leaves them as whole
// octets: vectors for memory, and one counter of the dropout generator each.
#include "dropout_mask.h"
#include "expert_ranges.h"
#include "launch.h"
#include "lora_tile.h"

namespace graft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
constexpr int kStrip = 32;               // columns a warp finishes at a time
constexpr int kMostColumnTiles = 65535;  // of a grid's second dimension
template <class T>
constexpr int kColumns = sizeof(T) == 2 ? 128 : 64;  // of a block
template <int R>
constexpr int kDepth = R < 16 ? 16 : R;  // summed: at least one tensor core's
template <int R>
constexpr int kPitch = kDepth<R> + (kDepth<R> > 16 ? 16 : 0);  // lanes read different banks

template <class T>
struct Args {
  const T *hidden, *factor, *base, *bias;
  const float* column_scale;
  T *unscaled, *out;
  int64_t rows, columns;
  int rank;
  FactorLayout layout;
  float scale;
  DropoutMask mask;
  ExpertRanges experts;
  bool aligned;
};

// V^T[begin .. begin + kColumns)[0 .. kDepth) to shared memory, zeros where there is no V.
template <class T, int R>
GPU_DEVICE void stage_factor(T (&staged)[kColumns<T>][kPitch<R>], const Args<T>& args,
                             int64_t begin) {
  for (int i = threadIdx.x; i < kColumns<T> * kDepth<R>; i += kThreads) {
    const bool ranks_first = args.layout == FactorLayout::columns_by_rank;
    const int rank = ranks_first ? i % kDepth<R> : i / kColumns<T>;
    const int column = ranks_first ? i / kDepth<R> : i % kColumns<T>;
    const int64_t from =
        ranks_first ? (begin + column) * args.rank + rank : rank * args.columns + begin + column;
    const bool exists = rank < args.rank && begin + column < args.columns;
    staged[column][rank] = exists ? args.factor[from] : from_float<T>(0.0f);
  }
}

// Eight finished sums of a row to memory.
template <class T>
GPU_DEVICE void finish_octet(const Args<T>& args, const float* sums, int64_t row, int64_t column) {
  const int64_t at = row * args.columns + column, valid = args.columns - column;
  uint32_t stay = 0xff;
  if (args.mask.threshold != 0) stay = staying(args.mask, mask_row(args.mask, row), column / 8);
  const Octet<T> base =
      args.base == nullptr ? zero_octet<T>() : load_octet(args.base + at, valid, args.aligned);
  T z[8], y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float term = (stay >> i & 1) != 0 ? args.scale * sums[i] : 0.0f;
    const float value = to_float(element(base, i)) + term;
    z[i] = from_float<T>(value);
    const bool exists = i < valid;
    const float c = args.column_scale != nullptr && exists ? args.column_scale[column + i] : 1.0f;
    const float b = args.bias != nullptr && exists ? to_float(args.bias[column + i]) : 0.0f;
    y[i] = from_float<T>(c * value + b);
  }
  if (args.unscaled != nullptr) store_octet(args.unscaled + at, make_octet(z), valid, args.aligned);
  store_octet(args.out + at, make_octet(y), valid, args.aligned);
}

template <class T, int R>
__global__ void __launch_bounds__(kThreads) lora_expand_kernel(Args<T> args) {
  GPU_SHARED(T, staged, [kColumns<T>][kPitch<R>]);
  GPU_SHARED(float, strips, [kWarps][16][kStrip + 4]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const RowTile tile = row_tile(args.experts, args.rows, kRows);
  if (tile.first >= tile.last) return;
  const int64_t first_row = tile.first + warp * 16;
  args.rows = tile.last;
  args.mask = mask_now(args.mask);
  if (tile.expert == args.experts.experts) args.rank = 0;  // nobody's rows
  args.factor += int64_t{tile.expert} * args.rank * args.columns;
  const int64_t first_column = int64_t{blockIdx.y} * kColumns<T>;
  stage_factor<T, R>(staged, args, first_column);

  // Element (row, k) of S for k = 16 step + 4t .. + 3, in the order in which `staged` is read
  // below.
  Fragment<T, 4> a[kDepth<R> / 16];
#pragma unroll
  for (int step = 0; step < kDepth<R> / 16; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + g + 8 * half;
      Group<T, 4> s = {};
      if (row < args.rows && 16 * step + 4 * t < R)
        s = load_aligned<T, 4>(args.hidden + row * R + 16 * step + 4 * t);
      a[step].set(half, make_pair(s.v[0], s.v[1]));
      a[step].set(2 + half, make_pair(s.v[2], s.v[3]));
    }
  }
  __syncthreads();

  auto& strip = strips[warp];
  for (int begin = 0; begin < kColumns<T> && first_column + begin < args.columns; begin += kStrip) {
#pragma unroll
    for (int j = 0; j < kStrip / 8; ++j) {
      float sums[4] = {};
#pragma unroll
      for (int step = 0; step < kDepth<R> / 16; ++step) {
        const Group<T, 4> v = load_aligned<T, 4>(&staged[begin + 8 * j + g][16 * step + 4 * t]);
        Fragment<T, 2> b;
        b.set(0, make_pair(v.v[0], v.v[1]));
        b.set(1, make_pair(v.v[2], v.v[3]));
        multiply_add<T>(sums, a[step], b);
      }
      store_pair(&strip[g][8 * j + 2 * t], sums[0], sums[1]);
      store_pair(&strip[g + 8][8 * j + 2 * t], sums[2], sums[3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * kStrip / 8; i += 32) {
      const int row = i / (kStrip / 8), column = i % (kStrip / 8) * 8;
      const int64_t to_row = first_row + row, to_column = first_column + begin + column;
      if (to_row < args.rows && to_column < args.columns)
        finish_octet(args, &strip[row][column], to_row, to_column);
    }
    __syncwarp();  // the strip is free again
  }
}

}  // namespace

cudaError_t launch_lora_expand(const LoraExpand& args, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns) || padded_rank(args.rank) == 0 ||
      !is_aligned(args.hidden) || args.dropout.threshold >= 65536 || !is_valid(args.experts))
    return cudaErrorInvalidValue;
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  const bool aligned = has_aligned_rows(args.out, args.columns) && is_aligned(args.base) &&
                       is_aligned(args.unscaled);
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t column_tiles = divide_up(args.columns, kColumns<T>);
    if (column_tiles > kMostColumnTiles) return cudaErrorInvalidValue;
    const Args<T> kernel_args = {static_cast<const T*>(args.hidden),
                                 static_cast<const T*>(args.factor),
                                 static_cast<const T*>(args.base),
                                 static_cast<const T*>(args.bias),
                                 args.column_scale,
                                 static_cast<T*>(args.unscaled),
                                 static_cast<T*>(args.out),
                                 args.rows,
                                 args.columns,
                                 args.rank,
                                 args.layout,
                                 args.scale * args.dropout.scale(),
                                 args.dropout,
                                 args.experts,
                                 aligned};
    return with_rank(args.rank, [&](auto rank) {
      return gpu::launch(lora_expand_kernel<T, decltype(rank)::value>,
                         grid_of(row_tiles(args.experts, args.rows, kRows), column_tiles),
                         dim3(kThreads), 0, stream, kernel_args);
    });
  });
}

}  // namespace graft::cuda
