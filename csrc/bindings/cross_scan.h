// What the bindings of cross_scan and cross_merge share.
#pragma once

#include "bindings/tensor.h"
#include "include/cross_merge.h"
#include "include/cross_scan.h"

namespace mobilemamba {

inline Scans scans_of(int64_t scans) {
  STD_TORCH_CHECK(0 <= scans && scans <= 2, "mobilemamba: scans must be 0, 1 or 2, got ", scans);
  return static_cast<Scans>(scans);
}

// Checks that a dimension has height · width elements, a product that may be too large for an integer.
inline void check_positions(const Tensor& t, int64_t dim, int64_t height, int64_t width) {
  const int64_t size = t.size(dim);
  const bool fits = width > 0 ? size % width == 0 && size / width == height : size == 0 && width == 0 && height >= 0;
  STD_TORCH_CHECK(fits, "mobilemamba: ", size, " positions are not ", height, " rows of ", width);
}

// images: (batch, C, H, W), or (batch, 4, C, H, W) with an image a sequence.
inline CrossScanParams with_maps(const Tensor& images, int64_t scans) {
  CrossScanParams p{};
  const int64_t dims = images.dim(), first = dims - 3;
  STD_TORCH_CHECK(dims == 4 || dims == 5, "mobilemamba: images must have 4 or 5 dimensions, got ", dims);
  p.batch = images.size(0), p.channels = images.size(first);
  p.height = images.size(first + 1), p.width = images.size(first + 2);
  p.scans = scans_of(scans), p.one_by_one = dims == 5;
  if (p.one_by_one) check_size(images, 1, 4);
  p.image = {elements(images), images.stride(0), images.stride(first), images.stride(first + 1),
             images.stride(first + 2)};
  p.next_image = p.one_by_one ? images.stride(1) : 0;
  return p;
}

// images: (batch, C, H W), or with channels_last (batch, H W, C), where an image a sequence is a dimension before C.
inline CrossScanParams with_rows(const Tensor& images, int64_t height, int64_t width, int64_t scans, bool one_by_one,
                                 bool channels_last) {
  CrossScanParams p{};
  const int64_t dims = images.dim(), channel = one_by_one + 1 + channels_last;
  const int64_t position = channels_last ? 1 : channel + 1;
  STD_TORCH_CHECK(dims == 3 + one_by_one, "mobilemamba: images in rows must have ", 3 + one_by_one, " dimensions, got ",
                  dims);
  p.batch = images.size(0), p.channels = images.size(channel), p.height = height, p.width = width;
  p.scans = scans_of(scans), p.one_by_one = one_by_one;
  if (one_by_one) check_size(images, channel - 1, 4);
  check_positions(images, position, height, width);
  const int64_t step = images.stride(position);
  p.image = {elements(images), images.stride(0), images.stride(channel), width * step, step};
  p.next_image = one_by_one ? images.stride(channel - 1) : 0;
  return p;
}

// sequences: (batch, 4, C, H W), or with channels_last (batch, H W, 4, C).
inline void set_sequences(CrossScanParams& p, const Tensor& sequences, bool channels_last) {
  const int64_t k = 1 + channels_last, channel = k + 1, position = channels_last ? 1 : 3;
  STD_TORCH_CHECK(sequences.dim() == 4, "mobilemamba: sequences must have 4 dimensions, got ", sequences.dim());
  check_size(sequences, 0, p.batch), check_size(sequences, k, 4), check_size(sequences, channel, p.channels);
  check_positions(sequences, position, p.height, p.width);
  p.sequence = {elements(sequences), sequences.stride(0), sequences.stride(channel), sequences.stride(position)};
  p.next_sequence = sequences.stride(k);
  STD_TORCH_CHECK(p.image.elements.dtype == p.sequence.elements.dtype,
                  "mobilemamba: images and sequences must have the same dtype");
}

// On tensors that `like` belongs to, which may be empty; each device has its own.
void run_cross_scan(const CrossScanParams& p, const Tensor& like);
void run_cross_merge(const CrossScanParams& p, const Tensor& like);

}  // namespace mobilemamba
