// Images and the four sequences they are laid out as: cross_scan goes one way, cross_merge the other.
#pragma once

#include "include/capability.h"
#include "include/tensor_view.h"

namespace mobilemamba {

enum class Scans : int8_t { kCross, kOneWay, kBothWays };  // see ops/cross_scan.py

struct CrossScanParams {
  int64_t batch, channels, height, width;
  Scans scans;
  bool one_by_one;  // each sequence has an image of its own
  Map image;
  int64_t next_image;  // the stride to the image of the next sequence; 0 unless one_by_one
  Sequence sequence;
  int64_t next_sequence;

  int64_t images() const { return one_by_one ? batch * 4 : batch; }
  // The image of sequence k.
  Map image_of(int64_t k) const {
    Map map = image;
    map.elements = image.elements + k * next_image;
    return map;
  }
  // Sequence k, seen as the map whose pixels it holds.
  Map map_of(int64_t k) const {
    const bool by_columns = scans == Scans::kCross && k % 2, backwards = scans != Scans::kOneWay && k >= 2;
    int64_t first = 0, row = by_columns ? 1 : width, column = by_columns ? height : 1;
    if (backwards) first = height * width - 1, row = -row, column = -column;
    return {sequence.elements + (k * next_sequence + first * sequence.position), sequence.batch, sequence.channel,
            row * sequence.position, column * sequence.position};
  }
};

// Channels, rows and columns of an image that a CPU works on at a time: where neighbours in memory are channels,
// columns, or each on one side.
struct CrossScanBlock {
  static constexpr int64_t kSide = 64;  // the most rows and columns, where neighbours are columns

  int64_t size[3];

  explicit CrossScanBlock(const CrossScanParams& p) {
    const bool image_inside = p.image.channel < p.image.column;
    const bool sequence_inside = p.sequence.channel < p.sequence.position;
    if (image_inside != sequence_inside) {
      size[0] = size[1] = size[2] = 16;
    } else if (image_inside) {
      size[0] = 256, size[1] = 1, size[2] = 4;
    } else {
      size[1] = p.height < kSide ? p.height : kSide, size[2] = p.width < kSide ? p.width : kSide;
      const int64_t small = kSide * kSide / (size[1] * (size[2] + 1) + 1);  // images, each with room for padding
      size[0] = small > 1 ? small : 1;
    }
  }
};

// The dimensions channel, row, column, the one with the largest steps first, those of one element before all.
struct Order {
  int dim[3];

  template <class Size>
  Order(const int64_t (&steps)[3], const Size (&sizes)[3]) : dim{0, 1, 2} {
    int64_t step[3];
    for (int i = 0; i < 3; ++i) step[i] = sizes[i] == 1 ? INT64_MAX : steps[i] < 0 ? -steps[i] : steps[i];
    sort(step, 0), sort(step, 1), sort(step, 0);
  }

 private:
  void sort(int64_t (&step)[3], int i) {
    if (step[i] >= step[i + 1]) return;
    const int64_t other = step[i];
    const int other_dim = dim[i];
    step[i] = step[i + 1], dim[i] = dim[i + 1], step[i + 1] = other, dim[i + 1] = other_dim;
  }
};

}  // namespace mobilemamba

DECLARE_KERNEL(cross_scan, CrossScanParams)
