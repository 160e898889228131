// Outer: dV (+)= scale * U^T drop(x), sums over all rows (tokens) into r x columns numbers.
//
// Bound by reading x. A warp keeps the sums of r ranks and 64 columns in registers and walks down
// the rows, 16 at a time; the octets of x that it loads become fragments of the tensor cores as
// they are (outer_step in lora_tile.h). A block's warps take the rows in turn, blocks take ranges
// of rows; the block's sums meet in shared memory, warp after warp, the blocks' in
// split_sum_kernel.
#include "dropout_mask.h"
#include "expert_ranges.h"
#include "launch.h"
#include "lora_tile.h"
#include "split_sum.h"

namespace graft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 64, kStepRows = 16;
constexpr int kSplitUnit = 256;  // rows
constexpr int kWantedBlocks = 512;
constexpr int kMostSplits = 16;

Split split_rows(int64_t rows, int64_t columns, int experts) {
  return split_of(rows, kSplitUnit, divide_up(columns, kColumns) * experts, kWantedBlocks,
                  kMostSplits);
}

struct Shape {
  int64_t rows, columns, split_rows;
  float scale;
  DropoutMask mask;
  ExpertRanges experts;
  bool aligned;
};

// The block's rows: its part of all rows, or of those of its expert, blockIdx.z.
struct Range {
  int64_t first, last;
};
GPU_DEVICE Range rows_of_block(const Shape& shape) {
  int64_t begin = 0, end = shape.rows, size = shape.split_rows;
  if (shape.experts.offsets != nullptr) {
    begin = shape.experts.offsets[blockIdx.z];
    end = shape.experts.offsets[blockIdx.z + 1];
    const int64_t parts = gridDim.y, each = (end - begin + parts - 1) / parts;
    size = (each + kSplitUnit - 1) / kSplitUnit * kSplitUnit;
  }
  const int64_t first = begin + blockIdx.y * size;
  return {first, first + size < end ? first + size : end};
}

// Of rank 64, two warps share the columns and have half of the ranks each: 128 sums a thread are
// too many.
template <int R>
constexpr int kRankWarps = R == 64 ? 2 : 1;

template <class T, int R>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2)
    lora_outer_kernel(const T* hidden, const T* x, Shape shape, float* parts) {
  constexpr int kRanks = R / 8 / kRankWarps<R>;  // of a lane
  constexpr int kRowWarps = kWarps / kRankWarps<R>;
  constexpr int kTiles = (kRanks + 1) / 2;
  GPU_SHARED(float, total, [R][kColumns]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank_warp = warp % kRankWarps<R>, row_warp = warp / kRankWarps<R>;
  const int first_rank = R / 8 * g + kRanks * rank_warp;
  const int64_t first_column = int64_t{blockIdx.x} * kColumns, column = first_column + 8 * g;
  const auto [first, last] = rows_of_block(shape);
  const DropoutMask mask = mask_now(shape.mask);

  float sums[kTiles][8][4] = {};
  for (int64_t begin = first + kStepRows * row_warp; begin < last; begin += kStepRows * kRowWarps) {
    Octet<T> values[4];
    Group<T, kRanks> u[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const int64_t row = begin + outer_row(t, slot),
                    valid = row < last ? shape.columns - column : 0;
      values[slot] = load_octet(x + row * shape.columns + column, valid, shape.aligned);
      u[slot] = {};
      if (row < last) u[slot] = load_aligned<T, kRanks>(hidden + row * R + first_rank);
    }
#pragma unroll
    for (int slot = 0; slot < 4; ++slot)
      drop(values[slot], mask, begin + outer_row(t, slot), last, column / 8);
    outer_step<T, kRanks>(sums, values, u);
  }

  for (int turn = 0; turn < kRowWarps; ++turn) {
    if (row_warp == turn) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int rank = 2 * m + e / 2;
            if (rank >= kRanks) continue;
            float& sum = total[first_rank + rank][8 * (2 * t + e % 2) + i];
            sum = turn == 0 ? sums[m][i][e] : sum + sums[m][i][e];
          }
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < R * kColumns; i += kThreads) {
    const int rank = i / kColumns, offset = i % kColumns;
    if (first_column + offset < shape.columns)
      parts[((int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * R + rank) * shape.columns +
            first_column + offset] = shape.scale * total[rank][offset];
  }
}

}  // namespace

size_t lora_outer_workspace(int64_t rows, int64_t columns, int rank, int experts) {
  return static_cast<size_t>(experts * split_rows(rows, columns, experts).count *
                             padded_rank(rank) * columns);
}

cudaError_t launch_lora_outer(const LoraOuter& args, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns) || padded_rank(args.rank) == 0 ||
      !is_aligned(args.hidden) || args.dropout.threshold >= 65536 || !is_valid(args.experts))
    return cudaErrorInvalidValue;
  if (args.columns == 0) return cudaSuccess;
  const int experts = args.experts.experts;
  const Split split = split_rows(args.rows, args.columns, experts);
  const Shape shape = {args.rows,
                       args.columns,
                       split.size,
                       args.scale * args.dropout.scale(),
                       args.dropout,
                       args.experts,
                       has_aligned_rows(args.x, args.columns)};
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return with_rank(args.rank, [&](auto rank) {
      constexpr int R = decltype(rank)::value;
      dim3 grid = grid_of(divide_up(args.columns, kColumns), split.count);
      grid.z = static_cast<unsigned>(experts);
      const cudaError_t error = gpu::launch(lora_outer_kernel<T, R>, grid, dim3(kThreads), 0,
                                            stream, static_cast<const T*>(args.hidden),
                                            static_cast<const T*>(args.x), shape, args.workspace);
      if (error != cudaSuccess) return error;
      const bool transposed = args.layout == FactorLayout::columns_by_rank;
      return launch_split_sum({args.workspace, split.count, R, args.columns, args.rank, transposed,
                               args.accumulate, experts},
                              args.out, stream);
    });
  });
}

}  // namespace graft::cuda
