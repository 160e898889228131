// Shrink: S = scale * drop(x) V^T, from wide rows to r columns.
//
// Bound by reading x, so everything serves that one stream: a lane loads eight columns of two rows
// into registers, drops elements there, and feeds the tensor cores from there (lora_tile.h). The
// factor, small and read by everybody, goes through shared memory in chunks. A block has 64 rows;
// where that makes too few blocks for a GPU, blocks also divide the columns, and split_sum_kernel
// adds their parts in order.
#include "dropout_mask.h"
#include "expert_ranges.h"
#include "launch.h"
#include "lora_tile.h"
#include "split_sum.h"

namespace graft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
constexpr int kSplitUnit = 512;     // columns; a multiple of every chunk
constexpr int kWantedBlocks = 512;  // about four for each multiprocessor of a large GPU
constexpr int kMostSplits = 16;

Split split_columns(int64_t rows, int64_t columns) {
  return split_of(columns, kSplitUnit, divide_up(rows, kRows), kWantedBlocks, kMostSplits);
}

struct Shape {
  int64_t rows, columns, split_columns;
  int rank;
  FactorLayout layout;
  float scale;
  DropoutMask mask;
  ExpertRanges experts;
  bool aligned_x, aligned_factor;
};

// Columns of the factor in shared memory at a time: at most 32 KiB.
template <class T, int R>
constexpr int kChunk = 32768 / (R * static_cast<int>(sizeof(T))) < 512
                           ? 32768 / (R * static_cast<int>(sizeof(T)))
                           : 512;
// Keeps eight lanes that read one vector each on different banks.
template <class T>
constexpr int kPadding = sizeof(T) == 2 ? 32 : 4;

// V[0 .. R)[begin .. begin + kChunk) to shared memory, zeros where there is no V.
template <class T, int R, int Width>
GPU_DEVICE void stage_factor(T (&staged)[R][Width], const T* factor, const Shape& shape,
                             int64_t begin) {
  constexpr int kOctets = kChunk<T, R> / 8;
  if (shape.layout == FactorLayout::rank_by_columns) {
    for (int i = threadIdx.x; i < R * kOctets; i += kThreads) {
      const int row = i / kOctets, column = i % kOctets * 8;
      const int64_t valid = row < shape.rank ? shape.columns - begin - column : 0;
      const Octet<T> v =
          load_octet(factor + row * shape.columns + begin + column, valid, shape.aligned_factor);
      store_octet(&staged[row][column], v, 8, true);
    }
  } else {
    for (int i = threadIdx.x; i < R * kChunk<T, R>; i += kThreads) {
      const int row = i % R, column = i / R;
      const bool exists = row < shape.rank && begin + column < shape.columns;
      staged[row][column] =
          exists ? factor[(begin + column) * shape.rank + row] : from_float<T>(0.0f);
    }
  }
}

// Blocks for a multiprocessor; 0: the compiler's choice, which spills registers for 16-bit rank 16.
template <class T, int R>
constexpr int kLeastBlocks = sizeof(T) == 2 && R == 16 ? 5 : 0;

template <class T, int R>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<T, R>)
    lora_shrink_kernel(const T* x, const T* factor, Shape shape, T* out, float* out_fp32) {
  constexpr int kSteps = sizeof(T) == 2 ? 4 : 2;  // of 32 columns whose loads are under way at once
  GPU_SHARED(T, staged, [R][kChunk<T, R> + kPadding<T>]);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const RowTile tile = row_tile(shape.experts, shape.rows, kRows);
  if (tile.first >= tile.last) return;
  const int64_t top_row = tile.first + threadIdx.x / 32 * 16 + g, bottom_row = top_row + 8;
  float* part = out_fp32 == nullptr ? nullptr : out_fp32 + blockIdx.y * shape.rows * R;
  shape.rows = tile.last;
  const DropoutMask mask = mask_now(shape.mask);
  if (tile.expert == shape.experts.experts) shape.rank = 0;  // nobody's rows
  factor += int64_t{tile.expert} * shape.rank * shape.columns;
  const int64_t first = blockIdx.y * shape.split_columns;
  const int64_t last =
      first + shape.split_columns < shape.columns ? first + shape.split_columns : shape.columns;
  const auto load = [&](int64_t row, int64_t column) {
    const int64_t valid = row < shape.rows ? last - column : 0;
    return load_octet(x + row * shape.columns + column, valid, shape.aligned_x);
  };

  float sums[R / 8][4] = {};
  for (int64_t begin = first; begin < last; begin += kChunk<T, R>) {
    __syncthreads();  // all have read the chunk before
    stage_factor<T, R>(staged, factor, shape, begin);
    __syncthreads();
    for (int at = 0; at < kChunk<T, R> && begin + at < last; at += 32 * kSteps) {
      Octet<T> top[kSteps], bottom[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        top[step] = load(top_row, begin + at + 32 * step + 8 * t);
        bottom[step] = load(bottom_row, begin + at + 32 * step + 8 * t);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int column = at + 32 * step + 8 * t;
        drop(top[step], mask, top_row, shape.rows, (begin + column) / 8);
        drop(bottom[step], mask, bottom_row, shape.rows, (begin + column) / 8);
        shrink_step(sums, top[step], bottom[step], g,
                    [&](int row) { return load_octet(&staged[row][column]); });
      }
    }
  }

#pragma unroll
  for (int j = 0; j < R / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = half == 0 ? top_row : bottom_row;
      if (row >= shape.rows) continue;
      const float low = shape.scale * sums[j][2 * half], high = shape.scale * sums[j][2 * half + 1];
      const int64_t to = row * R + 8 * j + 2 * t;
      if (part != nullptr)
        store_pair(part + to, low, high);
      else
        store_pair(out + to, low, high);
    }
  }
}

}  // namespace

size_t lora_shrink_workspace(int64_t rows, int64_t columns, int rank) {
  const int splits = split_columns(rows, columns).count;
  return splits <= 1 ? 0 : static_cast<size_t>(splits * rows * padded_rank(rank));
}

cudaError_t launch_lora_shrink(const LoraShrink& args, cudaStream_t stream) {
  const bool to_fp32 = args.out_fp32 != nullptr;
  const void* out = to_fp32 ? args.out_fp32 : args.out;
  if (!are_sizes(args.rows, args.columns) || padded_rank(args.rank) == 0 || !is_aligned(out) ||
      args.dropout.threshold >= 65536 || !is_valid(args.experts))
    return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  const Split split = split_columns(args.rows, args.columns);
  if (split.count > 1 && args.workspace == nullptr) return cudaErrorInvalidValue;
  const Shape shape = {args.rows,
                       args.columns,
                       split.size,
                       args.rank,
                       args.layout,
                       args.scale * args.dropout.scale(),
                       args.dropout,
                       args.experts,
                       has_aligned_rows(args.x, args.columns),
                       has_aligned_rows(args.factor, args.columns)};
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return with_rank(args.rank, [&](auto rank) {
      constexpr int R = decltype(rank)::value;
      const cudaError_t error = gpu::launch(
          lora_shrink_kernel<T, R>, grid_of(row_tiles(args.experts, args.rows, kRows), split.count),
          dim3(kThreads), 0, stream, static_cast<const T*>(args.x),
          static_cast<const T*>(args.factor), shape, static_cast<T*>(args.out),
          split.count > 1 ? args.workspace : args.out_fp32);
      if (error != cudaSuccess || split.count == 1) return error;
      const SplitSum sum = {args.workspace, split.count, args.rows, R, args.rows};
      return to_fp32 ? launch_split_sum(sum, args.out_fp32, stream)
                     : launch_split_sum(sum, static_cast<T*>(args.out), stream);
    });
  });
}

}  // namespace graft::cuda
