#include "packed_product.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include "packed_kernel.h"
#define GRAFT_PACKED_PRODUCT 1
#endif

namespace graft::ops {

#ifdef GRAFT_PACKED_PRODUCT

namespace {

using packed::kTileColumns;
using packed::kTileRows;

// A panel of a block (16 columns x 320) fills half of the first-level cache, the rows of x that a
// task passes over at a time stay in the second level.
constexpr int64_t kBlockDepth = 320;
constexpr int64_t kBlockRows = 192;
constexpr int64_t kMostPanels = 8;  // of 16 columns, in one task

// A piece of one term's depth.
struct Block {
  const ProductTerm* term;
  int64_t begin, depth;
};

std::vector<Block> blocks_of(std::span<const ProductTerm> terms) {
  std::vector<Block> blocks;
  for (const auto& term : terms) {
    const int64_t count = (term.depth + kBlockDepth - 1) / kBlockDepth;
    const int64_t depth = count == 0 ? 0 : ((term.depth + count - 1) / count + 7) / 8 * 8;
    for (int64_t begin = 0; begin < term.depth; begin += depth)
      blocks.push_back({&term, begin, std::min(depth, term.depth - begin)});
  }
  return blocks;
}

// Columns [column, column + 16) of a block whose w is [columns, depth], as [depth][16]; columns
// past the last are zeros.
void pack_transposed(const Block& block, int64_t column, int64_t columns, float* panel) {
  const auto& term = *block.term;
  const int64_t width = std::min<int64_t>(kTileColumns, columns - column);
  const float* from = term.w + column * term.w_stride + block.begin;
  int64_t done = 0;  // of the depth, where all sixteen columns exist
  if (width == kTileColumns) {
    for (; done + 8 <= block.depth; done += 8) {
      float* to = panel + done * kTileColumns;
      packed::transpose_8x8(from + done, term.w_stride, to);
      packed::transpose_8x8(from + done + 8 * term.w_stride, term.w_stride, to + 8);
    }
  }
  for (int64_t k = done; k < block.depth; ++k)
    for (int64_t j = 0; j < kTileColumns; ++j)
      panel[k * kTileColumns + j] = j < width ? from[j * term.w_stride + k] : 0.0f;
}

// The panels [begin, end) of a block, one after the other.
void pack_panels(const Block& block, int64_t begin, int64_t end, int64_t columns, float* to) {
  const int64_t panel_size = kTileColumns * block.depth;
  if (block.term->w_by_output) {
    for (int64_t p = begin; p < end; ++p)
      pack_transposed(block, p * kTileColumns, columns, to + (p - begin) * panel_size);
    return;
  }
  // Row by row, in the order in which w lies in memory.
  const int64_t whole = std::min(end, columns / kTileColumns);
  const float* from = block.term->w + block.begin * block.term->w_stride + begin * kTileColumns;
  for (int64_t k = 0; k < block.depth; ++k, from += block.term->w_stride, to += kTileColumns) {
    for (int64_t p = begin; p < whole; ++p)
      std::memcpy(to + (p - begin) * panel_size, from + (p - begin) * kTileColumns,
                  sizeof(float) * kTileColumns);
    if (whole == end) continue;
    float* last = to + (whole - begin) * panel_size;
    for (int64_t j = 0; j < kTileColumns; ++j)
      last[j] =
          whole * kTileColumns + j < columns ? from[(whole - begin) * kTileColumns + j] : 0.0f;
  }
}

void some_rows(int64_t count, const float* x, int64_t x_stride, const float* w, int64_t depth,
               float* y, int64_t y_stride, bool add) {
  using Kernel = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
  constexpr Kernel kernels[] = {nullptr,
                                packed::few_rows<1>,
                                packed::few_rows<2>,
                                packed::few_rows<3>,
                                packed::few_rows<4>,
                                packed::few_rows<5>,
                                packed::six_rows};
  kernels[count](x, x_stride, w, depth, y, y_stride, add);
}

// What the tasks of one product have in common.
struct Product {
  std::vector<Block> blocks;
  const float* bias;
  float* y;
  int64_t y_stride, rows, columns;

  // `count` rows of one panel.
  void tile(const Block& block, int64_t row, int64_t count, int64_t column, const float* panel,
            bool first) const {
    const auto& term = *block.term;
    const float* x = term.x + row * term.x_stride + block.begin;
    float* to = y + row * y_stride + column;
    const int64_t width = columns - column;
    if (width >= kTileColumns) {
      some_rows(count, x, term.x_stride, panel, block.depth, to, y_stride, !first);
      return;
    }
    float whole[kTileRows * kTileColumns];
    some_rows(count, x, term.x_stride, panel, block.depth, whole, kTileColumns, false);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width; ++j)
        to[i * y_stride + j] = whole[i * kTileColumns + j] + (first ? 0.0f : to[i * y_stride + j]);
  }

  // All rows of the panels [begin, end).
  void run(int64_t begin, int64_t end, float* scratch) const {
    for (size_t b = 0; b < blocks.size(); ++b) {
      const Block& block = blocks[b];
      const int64_t panel_size = kTileColumns * block.depth;
      pack_panels(block, begin, end, columns, scratch);
      for (int64_t first = 0; first < rows; first += kBlockRows) {
        const int64_t last = std::min(rows, first + kBlockRows);
        for (int64_t p = begin; p < end; ++p)
          for (int64_t row = first; row < last; row += kTileRows)
            tile(block, row, std::min<int64_t>(kTileRows, last - row), p * kTileColumns,
                 scratch + (p - begin) * panel_size, b == 0);
      }
    }
    if (bias == nullptr) return;
    const int64_t from = begin * kTileColumns, to = std::min(columns, end * kTileColumns);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = from; j < to; ++j) y[row * y_stride + j] += bias[j];
  }
};

float* thread_scratch() {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  constexpr size_t kBytes = sizeof(float) * kMostPanels * kTileColumns * (kBlockDepth + 8);
  static thread_local const std::unique_ptr<float, Free> scratch(
      static_cast<float*>(std::aligned_alloc(64, kBytes)));
  return scratch.get();
}

}  // namespace

bool packed_product_available() {
  static const bool available = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return available;
}

void packed_product(std::span<const ProductTerm> terms, const float* bias, float* y,
                    int64_t y_stride, int64_t rows, int64_t columns) {
  const Product product{blocks_of(terms), bias, y, y_stride, rows, columns};
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t threads = at::get_num_threads();
  std::atomic<int64_t> next{0};
  // Large tasks first, small ones at the end, so that all threads end together.
  const auto work = [&](int64_t, int64_t) {
    float* scratch = thread_scratch();
    for (int64_t begin = next; begin < panels;) {
      const int64_t size = std::clamp<int64_t>((panels - begin) / (2 * threads), 1, kMostPanels);
      if (!next.compare_exchange_weak(begin, begin + size)) continue;
      product.run(begin, begin + size, scratch);
      begin = next;
    }
  };
  at::parallel_for(0, threads, 1, work);
}

#else

bool packed_product_available() {
  return false;
}
void packed_product(std::span<const ProductTerm>, const float*, float*, int64_t, int64_t, int64_t) {
}

#endif

}  // namespace graft::ops
