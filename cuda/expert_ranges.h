/// Which rows a block of a kernel has where rows belong to experts. Offsets are read on the device,
/// so that a mixture's products are one launch each and the host need not know who has how many
/// rows.
#pragma once

#include "launch.h"

namespace graft::cuda {

/// Adjacent rows of one expert, or (expert == experts) of none.
struct RowTile {
  int64_t first, last;
  int expert;
};

/// At most a grid's second or third dimension; without offsets there is one factor.
inline bool is_valid(const ExpertRanges& ranges) {
  return ranges.experts >= 1 && ranges.experts <= 65535 &&
         (ranges.offsets != nullptr || ranges.experts == 1);
}

/// How many blocks have all rows' tiles: each expert, and the rows without one, may end in a tile
/// that is not full.
inline int64_t row_tiles(const ExpertRanges& ranges, int64_t rows, int tile_rows) {
  return divide_up(rows, tile_rows) + (ranges.offsets == nullptr ? 0 : ranges.experts);
}

/// The tile of the block (blockIdx.x): tile_rows rows from `first` on, of which those before `last`
/// exist. Empty (first == last) for blocks that are too many.
GPU_DEVICE RowTile row_tile(const ExpertRanges& ranges, int64_t rows, int tile_rows) {
  int64_t tile = blockIdx.x;
  if (ranges.offsets == nullptr) return {tile * tile_rows, rows, 0};
  for (int expert = 0; expert <= ranges.experts; ++expert) {
    const int64_t first = ranges.offsets[expert],
                  last = expert < ranges.experts ? ranges.offsets[expert + 1] : rows;
    const int64_t tiles = (last - first + tile_rows - 1) / tile_rows;
    if (tile < tiles) return {first + tile * tile_rows, last, expert};
    tile -= tiles;
  }
  return {rows, rows, ranges.experts};
}

}  // namespace graft::cuda
