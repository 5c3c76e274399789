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

  ANYWHERE int64_t images() const { return one_by_one ? batch * 4 : batch; }
  // The image of sequence k.
  ANYWHERE Map image_of(int64_t k) const {
    Map map = image;
    map.elements = image.elements + k * next_image;
    return map;
  }
  // Sequence k, seen as the map whose pixels it holds.
  ANYWHERE Map map_of(int64_t k) const {
    const bool by_columns = scans == Scans::kCross && k % 2, backwards = scans != Scans::kOneWay && k >= 2;
    int64_t first = 0, row = by_columns ? 1 : width, column = by_columns ? height : 1;
    if (backwards) first = height * width - 1, row = -row, column = -column;
    return {sequence.elements + (k * next_sequence + first * sequence.position), sequence.batch, sequence.channel,
            row * sequence.position, column * sequence.position};
  }
};

// Channels, rows and columns of an image that are worked on at a time: where neighbours in memory are channels,
// columns, or each on one side.
struct CrossScanBlock {
  static constexpr int64_t kMost = 4096;  // elements

  int64_t size[3];

  ANYWHERE explicit CrossScanBlock(const CrossScanParams& p) {
    const bool image_inside = p.image.channel < p.image.column;
    const bool sequence_inside = p.sequence.channel < p.sequence.position;
    if (image_inside != sequence_inside) {
      size[0] = size[1] = size[2] = 16;
    } else if (image_inside) {
      size[0] = 256, size[1] = 1, size[2] = 4;
    } else {
      size[1] = p.height < 64 ? p.height : 64, size[2] = p.width < 64 ? p.width : 64;
      const int64_t pixels = size[1] * size[2];
      size[0] = pixels ? kMost / pixels : 1;  // several small images
    }
  }
};

// The dimensions channel, row, column of a map, the one with the largest steps first.
struct Order {
  int dim[3];

  ANYWHERE explicit Order(const int64_t (&stride)[3]) : dim{0, 1, 2} {
    int64_t size[3];
    for (int i = 0; i < 3; ++i) size[i] = stride[i] < 0 ? -stride[i] : stride[i];
    sort(size, 0), sort(size, 1), sort(size, 0);
  }

 private:
  ANYWHERE void sort(int64_t (&size)[3], int i) {
    if (size[i] >= size[i + 1]) return;
    const int64_t other = size[i];
    const int other_dim = dim[i];
    size[i] = size[i + 1], dim[i] = dim[i + 1], size[i + 1] = other, dim[i + 1] = other_dim;
  }
};

}  // namespace mobilemamba

DECLARE_KERNEL(cross_scan, CrossScanParams)
