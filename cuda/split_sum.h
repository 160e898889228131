/// The second half of a sum that several blocks share: the parts lie in a workspace, and are added
/// in the order of their numbers. (Atomic additions would save this pass and lose the same bits in
/// every run.)
#pragma once

#include "launch.h"

namespace graft::cuda {

/// out (+)= sum of parts[split] over [0, splits). A part is [rows, columns]; of its rows the first
/// `used_rows` are wanted. `transposed`: out is [columns, used_rows], otherwise [used_rows,
/// columns].
struct SplitSum {
  const float* parts;
  int splits;
  int64_t rows, columns, used_rows;
  bool transposed = false, accumulate = false;
  int groups = 1;  ///< so many sums, their parts and results one behind the other
};

inline constexpr int kSplitSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSplitSumThreads) split_sum_kernel(SplitSum args, T* out) {
  const int64_t index = int64_t{blockIdx.x} * kSplitSumThreads + threadIdx.x;
  if (index >= args.used_rows * args.columns) return;
  args.parts += int64_t{blockIdx.y} * args.splits * args.rows * args.columns;
  out += int64_t{blockIdx.y} * args.used_rows * args.columns;
  const int64_t row = index / args.columns, column = index % args.columns;
  const int64_t to = args.transposed ? column * args.used_rows + row : index;
  float sum = args.parts[index];
  for (int split = 1; split < args.splits; ++split)
    sum += args.parts[split * args.rows * args.columns + index];
  if (args.accumulate) sum += to_float(out[to]);
  out[to] = from_float<T>(sum);
}

template <class T>
cudaError_t launch_split_sum(const SplitSum& args, T* out, cudaStream_t stream) {
  const int64_t blocks = divide_up(args.used_rows * args.columns, kSplitSumThreads);
  if (blocks == 0) return cudaSuccess;
  return gpu::launch(split_sum_kernel<T>, grid_of(blocks, args.groups), dim3(kSplitSumThreads), 0,
                     stream, args, out);
}

}  // namespace graft::cuda
