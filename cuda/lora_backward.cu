// Backward: dS = s dY B and dB (+)= s dY^T S with one read of dY.
//
// Bound by reading dY, which the two products of lora_shrink.cu and lora_outer.cu would do twice. A
// warp owns 64 columns: their share of B stays in registers, and so do the sums of dB, while tiles
// of 16 rows of dY pass through its own corner of shared memory, the next one being copied while
// one is used. The products want a tile in two different distributions over lanes; shared memory
// gives both.
//   A block has eight warps, 512 columns. Their shares of dS meet in shared memory after each tile
//   and
// go to a workspace; shares of other blocks (of dS: other columns, of dB: other rows) are added in
// order.
//   At large ranks dB and B do not fit into registers together: then the two kernels run after all.
#include "launch.h"
#include "lora_tile.h"
#include "split_sum.h"

namespace graft::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kWarpColumns = 64, kColumns = kWarps * kWarpColumns, kTileRows = 16;
constexpr int kStages = 2;
constexpr int kSplitUnit = 128;  // rows
constexpr int kWantedBlocks = 264;
constexpr int kMostSplits = 64;

template <class T, int R>
constexpr bool kFused = R <= (sizeof(T) == 2 ? 32 : 16);

bool is_fused(ElementType type, int rank) {
  return padded_rank(rank) <= (type == ElementType::fp32 ? 16 : 32);
}

Split split_rows(int64_t rows, int64_t columns) {
  return split_of(rows, kSplitUnit, divide_up(columns, kColumns), kWantedBlocks, kMostSplits);
}

struct Shape {
  int64_t rows, columns, split_rows;
  int rank;
  float scale;
  bool aligned;
};

// Where octet `octet` of a tile's row lies among the row's eight: such that lanes of one access, be
// they two rows of four octets or four rows of two, are on different banks (16-bit types).
GPU_DEVICE int place_of(int row, int octet) {
  return octet ^ ((row & 1) << 2 | (row & 2));
}

// Rows begin .. begin + 15 of the warp's columns to shared memory, zeros where there is no dY.
template <class T>
GPU_DEVICE void stage_tile(T* tile, const T* dy, const Shape& shape, int64_t begin, int64_t last,
                           int64_t column, int lane) {
#pragma unroll
  for (int i = lane; i < kTileRows * 8; i += 32) {
    const int row = i / 8, octet = i % 8;
    T* to = tile + row * kWarpColumns + 8 * place_of(row, octet);
    const bool exists = begin + row < last && column + 8 * octet < shape.columns;
    const T* from = exists ? dy + (begin + row) * shape.columns + column + 8 * octet : dy;
    if (shape.aligned) {
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(T)) / 2; ++part)
        gpu::cp_async16(to + part * (16 / sizeof(T)), from + part * (16 / sizeof(T)),
                        exists ? 16 : 0);
    } else {
      store_octet(to, load_octet(from, exists ? shape.columns - column - 8 * octet : 0, false), 8,
                  true);
    }
  }
  gpu::cp_async_commit();
}

// Columns 8t .. 8t + 7 (and those 32 further) of B's row g of each group of eight ranks.
template <class T, int R>
GPU_DEVICE void load_factor(Octet<T> (&v)[2][R / 8], const T* B, const Shape& shape, int64_t column,
                            int g, int t) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int j = 0; j < R / 8; ++j) {
      T values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t at = column + 32 * step + 8 * t + i;
        const bool exists = 8 * j + g < shape.rank && at < shape.columns;
        values[i] = exists ? B[at * shape.rank + 8 * j + g] : from_float<T>(0.0f);
      }
      v[step][j] = make_octet(values);
    }
  }
}

template <class T, int R>
__global__ void __launch_bounds__(kThreads)
    lora_backward_kernel(const T* dy, const T* hidden, const T* B, Shape shape,
                         float* d_hidden_parts, float* dB_parts) {
  constexpr int kRanks = R / 8, kTiles = (kRanks + 1) / 2, kTile = kTileRows * kWarpColumns;
  gpu::Carver shared;
  T* tiles = shared.take<T>(kStages * kWarps * kTile);              // [stage][warp][row][column]
  float* meeting = shared.take<float>(2 * kWarps * kTileRows * R);  // [tile % 2][warp][row][rank]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t column = int64_t{blockIdx.x} * kColumns + warp * kWarpColumns;
  const int64_t first = blockIdx.y * shape.split_rows;
  const int64_t last =
      first + shape.split_rows < shape.rows ? first + shape.split_rows : shape.rows;
  const int64_t tile_count = (last - first + kTileRows - 1) / kTileRows;
  const auto tile_of = [&](int64_t index) {
    return tiles + (index % kStages * kWarps + warp) * kTile;
  };

  Octet<T> factor[2][R / 8];
  load_factor<T, R>(factor, B, shape, column, g, t);
  stage_tile(tile_of(0), dy, shape, first, last, column, lane);
  float dB_sums[kTiles][8][4] = {};
  for (int64_t index = 0; index < tile_count; ++index) {
    const int64_t begin = first + index * kTileRows;
    // Overwrites the tile before this one, which all lanes had used before the last barrier.
    stage_tile(tile_of(index + 1), dy, shape, begin + kTileRows, last, column, lane);
    gpu::cp_async_wait<1>();
    __syncwarp();  // every lane's copies have arrived
    const T* tile = tile_of(index);
    const auto octet_of = [&](int row, int octet) {
      return load_octet(tile + row * kWarpColumns + 8 * place_of(row, octet));
    };

    float d_hidden_sums[R / 8][4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      shrink_step(d_hidden_sums, octet_of(g, 4 * step + t), octet_of(g + 8, 4 * step + t), g,
                  [&](int row) { return factor[step][row / 8]; });
    }
    float* mine = meeting + (index % 2 * kWarps + warp) * kTileRows * R;
#pragma unroll
    for (int j = 0; j < R / 8; ++j) {
      store_pair(mine + g * R + 8 * j + 2 * t, d_hidden_sums[j][0], d_hidden_sums[j][1]);
      store_pair(mine + (g + 8) * R + 8 * j + 2 * t, d_hidden_sums[j][2], d_hidden_sums[j][3]);
    }

    Octet<T> values[4];
    Group<T, kRanks> u[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const int row = outer_row(t, slot);
      values[slot] = octet_of(row, g);
      u[slot] = {};
      if (begin + row < last)
        u[slot] = load_aligned<T, kRanks>(hidden + (begin + row) * R + kRanks * g);
    }
    outer_step<T, kRanks>(dB_sums, values, u);

    // One barrier a tile: the other half of `meeting` was read before the last one.
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * R; i += kThreads) {
      if (begin + i / R >= last) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += meeting[(index % 2 * kWarps + w) * kTileRows * R + i];
      d_hidden_parts[(int64_t{blockIdx.x} * shape.rows + begin) * R + i] = shape.scale * sum;
    }
  }
  gpu::cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int rank = 2 * m + e / 2;
        const int64_t to_column = column + 8 * (2 * t + e % 2) + i;
        if (rank < kRanks && to_column < shape.columns)
          dB_parts[(int64_t{blockIdx.y} * R + kRanks * g + rank) * shape.columns + to_column] =
              shape.scale * dB_sums[m][i][e];
      }
    }
  }
}

template <class T, int R>
cudaError_t launch_fused(const LoraBackward& args, cudaStream_t stream) {
  const Split split = split_rows(args.rows, args.columns);
  const auto column_blocks = static_cast<int>(divide_up(args.columns, kColumns));
  const Shape shape = {args.rows, args.columns, split.size,
                       args.rank, args.scale,   has_aligned_rows(args.dy, args.columns)};
  float* dB_parts = args.workspace + column_blocks * args.rows * R;
  const size_t shared =
      kStages * kTileRows * kColumns * sizeof(T) + 2 * kWarps * kTileRows * R * sizeof(float);
  cudaError_t error = gpu::launch(lora_backward_kernel<T, R>, grid_of(column_blocks, split.count),
                                  dim3(kThreads), shared, stream, static_cast<const T*>(args.dy),
                                  static_cast<const T*>(args.hidden), static_cast<const T*>(args.B),
                                  shape, args.workspace, dB_parts);
  if (error != cudaSuccess) return error;
  error = launch_split_sum({args.workspace, column_blocks, args.rows, R, args.rows},
                           static_cast<T*>(args.d_hidden), stream);
  if (error != cudaSuccess) return error;
  return launch_split_sum(
      {dB_parts, split.count, R, args.columns, args.rank, true, args.accumulate}, args.dB, stream);
}

// Two kernels, each with a read of dY.
cudaError_t launch_apart(const LoraBackward& args, cudaStream_t stream) {
  LoraShrink shrink = {.type = args.type,
                       .x = args.dy,
                       .factor = args.B,
                       .layout = FactorLayout::columns_by_rank,
                       .rows = args.rows,
                       .columns = args.columns,
                       .rank = args.rank,
                       .scale = args.scale,
                       .out = args.d_hidden,
                       .workspace = args.workspace};
  if (const cudaError_t error = launch_lora_shrink(shrink, stream); error != cudaSuccess)
    return error;
  return launch_lora_outer({.type = args.type,
                            .hidden = args.hidden,
                            .x = args.dy,
                            .layout = FactorLayout::columns_by_rank,
                            .rows = args.rows,
                            .columns = args.columns,
                            .rank = args.rank,
                            .scale = args.scale,
                            .accumulate = args.accumulate,
                            .out = args.dB,
                            .workspace = args.workspace},
                           stream);
}

}  // namespace

size_t lora_backward_workspace(ElementType type, int64_t rows, int64_t columns, int rank) {
  if (!is_fused(type, rank)) {
    const size_t shrink = lora_shrink_workspace(rows, columns, rank);
    const size_t outer = lora_outer_workspace(rows, columns, rank);
    return shrink > outer ? shrink : outer;
  }
  return static_cast<size_t>(padded_rank(rank) * (divide_up(columns, kColumns) * rows +
                                                  split_rows(rows, columns).count * columns));
}

cudaError_t launch_lora_backward(const LoraBackward& args, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns) || padded_rank(args.rank) == 0 ||
      !is_aligned(args.hidden) || !is_aligned(args.d_hidden))
    return cudaErrorInvalidValue;
  if (!is_fused(args.type, args.rank) || args.rows == 0 || args.columns == 0)
    return launch_apart(args, stream);
  return with_element(args.type, [&](auto zero) {
    return with_rank(args.rank, [&](auto rank) {
      using T = decltype(zero);
      constexpr int R = decltype(rank)::value;
      if constexpr (kFused<T, R>) return launch_fused<T, R>(args, stream);
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace graft::cuda
