// What cross_scan and cross_merge share: an image and its sequences are gone through tile by tile, in the order in
// which each of them lies, and a tile waits in shared memory between two orders.
//
// Neighbours in memory are channels ("inside"), columns, or rows in a sequence that goes column by column. A thread
// takes a run of them at a time: 16 bytes or one element of channels; along rows and columns 16, 8 or 4 bytes or one
// element, as sizes, steps and pointers divide. A tile fills a quarter or a third of a multiprocessor's shared memory:
// whole maps of some channels where sequences are runs of positions (up to 64×64, at least 16 bytes of channels where
// these are inside the image), some rows of up to 128 bytes of channels where sequences have channels inside. Where
// both have, a run goes through registers alone. A tile's offsets are 32 bits: it shrinks until they are.
//
// Instructions of a thread for 16 bytes read or written (sm_90, 16 bits, 56×56): 10 to 35 for a scan, 25 to 45 for a
// merge, where 110 would be as long as memory takes.
#pragma once

#include <initializer_list>

#include "cuda/device.h"
#include "include/cross_scan.h"

namespace mobilemamba {

constexpr int kCrossThreads = 256;
enum : int { kChannel, kRow, kColumn };  // dimensions of an image

struct CrossPlan : CrossScanParams {
  bool image_inside, sequence_inside;
  int channel_run, position_run;
  Map sequences[4];   // as map_of has them
  unsigned size[3];   // of a tile
  unsigned pitch;     // of its channels in shared memory
  unsigned tiles[3];  // of an image
  // Of a walk whose runs are along a dimension: runs, runs of a line, and lines that follow each other.
  unsigned runs[3];
  Divisor of_line[3], lines[3];
};

// Elements that lie side by side; two of 16 bits share a word.
template <class T, int kRun>
struct alignas(kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16) Run {
  static constexpr int kPerWord = sizeof(T) == 2 && kRun > 1 ? 2 : 1, kWords = kRun / kPerWord;
  using Word = std::conditional_t<kPerWord == 2, uint32_t, T>;
  Word words[kWords];

  static __device__ __forceinline__ Run load(const T* from) { return *reinterpret_cast<const Run*>(from); }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Run*>(to) = *this; }
  __device__ __forceinline__ Run reversed() const {
    Run other;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      other.words[i] = words[kWords - 1 - i];
      if constexpr (kPerWord == 2) other.words[i] = other.words[i] >> 16 | other.words[i] << 16;
    }
    return other;
  }
};

// Of a run's first element in a tile.
struct Place {
  unsigned of[3];
  bool inside;
};

// A tile in shared memory. After each run of rows, and of channels, there is room for one, so that runs that follow
// each other are in other banks.
template <class E, int kPositions, int kChannels>
struct Waiting {
  E* elements;
  unsigned pitch, width;

  __device__ explicit Waiting(const CrossPlan& p)
      : elements(reinterpret_cast<E*>(shared_memory)), pitch(p.pitch), width(p.size[kColumn]) {}
  template <int kAlong>
  __device__ __forceinline__ unsigned step() const {
    return kAlong == kChannel ? pitch : kAlong == kRow ? width : 1;
  }
  __device__ __forceinline__ E* at(const Place& place) const {
    constexpr unsigned kRoom = kPositions > kChannels ? kPositions : kChannels;
    return elements + (place.of[kChannel] * pitch + place.of[kChannel] / kChannels * kRoom + place.of[kRow] * width +
                       place.of[kRow] / kPositions * kPositions + place.of[kColumn]);
  }
  template <int kAlong, int kRun>
  __device__ __forceinline__ Run<E, kRun> get(const Place& place) const {
    const E* from = at(place);
    if constexpr (kAlong == kColumn) {
      return Run<E, kRun>::load(from);
    } else {
      Run<E, kRun> run;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const E element = from[j * step<kAlong>()];
        if constexpr (Run<E, kRun>::kPerWord == 1)
          run.words[j] = element;
        else
          run.words[j / 2] = j % 2 ? run.words[j / 2] | uint32_t{element} << 16 : element;
      }
      return run;
    }
  }
  template <int kAlong, int kRun>
  __device__ __forceinline__ void put(const Place& place, const Run<E, kRun>& run) const {
    E* to = at(place);
    if constexpr (kAlong == kColumn) {
      run.store(to);
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if constexpr (Run<E, kRun>::kPerWord == 1)
          to[j * step<kAlong>()] = run.words[j];
        else
          to[j * step<kAlong>()] = static_cast<E>(run.words[j / 2] >> j % 2 * 16);
      }
    }
  }
};

// A block's tile. kCross: all four sequences of a cross scan; else what the parameters say.
template <class T, bool kCross>
struct CrossTile {
  const CrossPlan& p;
  unsigned size[3], k;  // k: the sequence whose image it is, if they are one by one
  T *image, *sequences[4];

  __device__ explicit CrossTile(const CrossPlan& plan) : p(plan) {
    const int64_t whole[3] = {p.channels, p.height, p.width};
    int64_t first[3];
    unsigned item = blockIdx.x;
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      first[i] = int64_t{item % p.tiles[i]} * p.size[i], item /= p.tiles[i];
      size[i] = static_cast<unsigned>(whole[i] - first[i] < p.size[i] ? whole[i] - first[i] : p.size[i]);
    }
    k = !kCross && p.one_by_one ? item % 4 : 0;
    const int64_t batch = !kCross && p.one_by_one ? item / 4 : item;
    const auto origin = [&](const Map& map) {
      T* pointer = static_cast<T*>(map.elements.data) + (batch * map.batch + first[kChannel] * map.channel +
                                                         first[kRow] * map.row + first[kColumn] * map.column);
#ifdef __CUDA_ARCH__  // an address is then one multiply-add
      size_t address = __cvta_generic_to_global(pointer);
      hide(address);
      pointer = static_cast<T*>(__cvta_global_to_generic(address));
#endif
      return pointer;
    };
    image = origin(p.image) + k * p.next_image;
#pragma unroll
    for (int i = 0; i < 4; ++i) sequences[i] = origin(p.sequences[i]);
  }

  // Sequences, a bit each: all that the image has, and those that go through it row by row or column by column.
  __device__ unsigned all() const { return !kCross && p.one_by_one ? 1u << k : 15; }
  __device__ unsigned by_rows() const { return all() & (kCross || p.scans == Scans::kCross ? 5 : 15); }
  __device__ unsigned by_columns() const { return all() & (kCross || p.scans == Scans::kCross ? 10 : 0); }
  __device__ bool backwards(int sequence) const { return sequence >= 2 && (kCross || p.scans != Scans::kOneWay); }

  template <int kAlong, int kRun>
  __device__ __forceinline__ Run<T, kRun> load(const Place& place) const {
    return Run<T, kRun>::load(image_at(place));
  }
  template <int kAlong, int kRun>
  __device__ __forceinline__ void store(const Place& place, const Run<T, kRun>& run) const {
    run.store(image_at(place));
  }
  template <int kAlong, int kRun>
  __device__ __forceinline__ Run<T, kRun> load(int sequence, const Place& place) const {
    const auto run = Run<T, kRun>::load(sequence_at<kAlong, kRun>(sequence, place));
    return kAlong != kChannel && backwards(sequence) ? run.reversed() : run;
  }
  template <int kAlong, int kRun>
  __device__ __forceinline__ void store(int sequence, const Place& place, const Run<T, kRun>& run) const {
    T* const to = sequence_at<kAlong, kRun>(sequence, place);
    if (kAlong != kChannel && backwards(sequence))
      run.reversed().store(to);
    else
      run.store(to);
  }

  // Calls use(place, load(place)) for this thread's runs along a dimension; several loads are on their way at once.
  template <int kAlong, int kRun, int kLoads, class Load, class Use>
  __device__ __forceinline__ void walk(Load load, Use use) const {
    constexpr int kNext = kAlong == kColumn ? kRow : kColumn, kLast = 3 - kAlong - kNext;
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < p.runs[kAlong]; i += kLoads * kCrossThreads) {
      Place at[kLoads];
      decltype(load(at[0])) runs[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const unsigned run = i + u * kCrossThreads, line = p.of_line[kAlong].quotient(run),
                       last = p.lines[kAlong].quotient(line);
        at[u].of[kAlong] = (run - line * p.of_line[kAlong].divisor) * kRun;
        at[u].of[kNext] = line - last * p.lines[kAlong].divisor;
        at[u].of[kLast] = last;
        at[u].inside = at[u].of[0] < size[0] && at[u].of[1] < size[1] && at[u].of[2] < size[2];
        if (at[u].inside) runs[u] = load(at[u]);
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u)
        if (at[u].inside) use(at[u], runs[u]);
    }
  }

 private:
  __device__ __forceinline__ T* image_at(const Place& place) const {
    return image + static_cast<int>(place.of[kChannel] * static_cast<int>(p.image.channel) +
                                    place.of[kRow] * static_cast<int>(p.image.row) +
                                    place.of[kColumn] * static_cast<int>(p.image.column));
  }
  template <int kAlong, int kRun>
  __device__ __forceinline__ T* sequence_at(int sequence, const Place& place) const {
    const Map& forwards = p.sequences[sequence % 2];
    const int position = static_cast<int>(place.of[kRow] * static_cast<int>(forwards.row) +
                                          place.of[kColumn] * static_cast<int>(forwards.column));
    T* const from = sequences[sequence] + (static_cast<int>(place.of[kChannel]) * static_cast<int>(forwards.channel) +
                                           (backwards(sequence) ? -position : position));
    return kAlong != kChannel && backwards(sequence) ? from - (kRun - 1) : from;
  }
};

// The plan of tiles whose elements have a size in shared memory, and how many floats a tile takes there.
inline CrossPlan plan_cross(const CrossScanParams& params, int64_t element, int64_t& shared_floats) {
  constexpr int64_t kMostBytes = 60 << 10, kMostSide = 64, kMostRuns = 2048;
  CrossPlan p{params};
  const int64_t bytes = element_size(p.image.elements.dtype), vector = 16 / bytes, positions = p.height * p.width;
  const bool cross = p.scans == Scans::kCross;
  if (p.batch == 1) p.image.batch = p.sequence.batch = 0;  // a dimension of size 1 has any stride
  if (p.channels == 1) p.image.channel = p.sequence.channel = 0;
  if (p.height == 1) p.image.row = 0;
  if (p.width == 1) p.image.column = 0;
  if (positions == 1) p.sequence.position = 0;
  const int64_t next_pixel = p.width > 1 ? p.image.column : p.image.row;
  p.image_inside = p.channels > 1 && (positions == 1 || p.image.channel < next_pixel);
  p.sequence_inside = p.channels > 1 && (positions == 1 || p.sequence.channel < p.sequence.position);

  const auto runs = [&](const Elements& e, int64_t run, int64_t dense, std::initializer_list<int64_t> others) {
    bool fits = dense == 1 && reinterpret_cast<uintptr_t>(e.data) % (run * bytes) == 0;
    for (const int64_t step : others) fits = fits && step % run == 0;
    return fits;
  };
  const Map& m = p.image;
  const Sequence& s = p.sequence;
  const auto channels_in = [&](int64_t run) {
    return (p.image_inside || p.sequence_inside) && p.channels % run == 0 &&
           (!p.image_inside || runs(m.elements, run, m.channel, {m.batch, m.row, m.column, p.next_image})) &&
           (!p.sequence_inside || runs(s.elements, run, s.channel, {s.batch, s.position, p.next_sequence}));
  };
  const auto positions_in = [&](int64_t run) {
    return (!p.image_inside || !p.sequence_inside) && p.width % run == 0 &&
           (p.image_inside || runs(m.elements, run, m.column, {m.batch, m.channel, m.row, p.next_image})) &&
           (p.sequence_inside || ((!cross || p.height % run == 0) &&
                                  runs(s.elements, run, s.position, {s.batch, s.channel, p.next_sequence})));
  };
  int64_t channel_run = channels_in(vector) ? vector : 1;
  int64_t position_run = vector;
  while (position_run > 1 && !positions_in(position_run)) position_run /= 2;

  // Tiles, the largest first.
  const auto share_of = [](int64_t size, int64_t most, int64_t unit) {
    return unit * share(ceil_div(size, unit), most / unit);
  };
  int64_t least[3] = {p.image_inside && p.channels >= vector ? vector : channel_run,
                      p.sequence_inside ? 1 : position_run, position_run};
  const int64_t most_channels = !p.sequence_inside ? 4096 : p.image_inside ? 64 * vector : 8 * vector;
  int64_t size[3];
  const auto begin = [&] {
    size[kChannel] = share_of(p.channels, most_channels, least[kChannel]);
    size[kRow] = share_of(p.height, kMostSide, position_run);
    size[kColumn] = share_of(p.width, kMostSide, position_run);
  };
  begin();
  const auto pitch = [&] { return size[kRow] * size[kColumn] + ceil_div(size[kRow], position_run) * position_run; };
  const auto bytes_of_tile = [&] {
    const int64_t room = channel_run > position_run ? channel_run : position_run;
    return p.image_inside && p.sequence_inside
               ? 0
               : (size[kChannel] * pitch() + ceil_div(size[kChannel], channel_run) * room) * element;
  };
  const auto in_32_bits = [&](const Map& map) {
    const int64_t steps[3] = {map.channel, map.row, map.column};
    int64_t last = channel_run + position_run;
    for (int i = 0; i < 3; ++i) last += (size[i] - 1) * (steps[i] < 0 ? -steps[i] : steps[i]);
    return last <= INT32_MAX;
  };
  const auto fits = [&] {
    return (p.image_inside && p.sequence_inside ? size[0] / channel_run * size[1] * size[2] <= kMostRuns
                                                : bytes_of_tile() <= kMostBytes) &&
           in_32_bits(p.image) && in_32_bits(p.map_of(0)) && in_32_bits(p.map_of(1));
  };
  const auto smaller = [&](int i) {
    if (size[i] <= least[i]) return false;
    size[i] = ceil_div(ceil_div(size[i], 2), least[i]) * least[i];
    return true;
  };
  while (!fits()) {
    const int longer = size[kRow] >= size[kColumn] ? kRow : kColumn;
    if (p.sequence_inside ? smaller(kRow) || smaller(kColumn) || smaller(kChannel)
                          : smaller(kChannel) || smaller(longer) || smaller(kRow + kColumn - longer))
      continue;
    // Steps so wide that 32 bits do not reach over a run's neighbours: single channels, then single elements.
    if (least[kChannel] == 1) position_run = least[kRow] = least[kColumn] = 1;
    channel_run = least[kChannel] = 1;
    begin();
  }

  const int64_t whole[3] = {p.channels, p.height, p.width};
  for (int i = 0; i < 3; ++i) {
    const int next = i == kColumn ? kRow : kColumn, last = 3 - i - next;
    const int64_t of_line = ceil_div(size[i], i == kChannel ? channel_run : position_run);
    p.size[i] = static_cast<unsigned>(size[i]);
    p.tiles[i] = static_cast<unsigned>(ceil_div(whole[i], size[i]));
    p.of_line[i] = Divisor(of_line), p.lines[i] = Divisor(size[next]);
    p.runs[i] = static_cast<unsigned>(of_line * size[next] * size[last]);
  }
  for (int k = 0; k < 4; ++k) p.sequences[k] = p.map_of(k);
  p.channel_run = static_cast<int>(channel_run), p.position_run = static_cast<int>(position_run);
  p.pitch = static_cast<unsigned>(pitch());
  shared_floats = ceil_div(bytes_of_tile(), 4);
  return p;
}

// Calls f with a run's length, of which kMost is the longest.
template <int kMost, class F>
auto with_run(int64_t run, F f) {
  if constexpr (kMost > 1)
    if (run < kMost) return with_run<kMost / 2>(run, f);
  return f(std::integral_constant<int, kMost>{});
}

// Launches the kernel that `kernel_of` has for runs of positions and of channels, and for a cross scan of an image.
template <class T, class KernelOf>
cudaError_t launch_cross(const CrossScanParams& params, int64_t element, KernelOf kernel_of, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  int64_t shared_floats;
  CrossPlan p = plan_cross(params, element, shared_floats);
  void (*const kernel)(CrossPlan) = with_run<kVector>(p.position_run, [&](auto positions) {
    const auto with_channels = [&](auto channels) {
      return p.scans == Scans::kCross && !p.one_by_one ? kernel_of(positions, channels, std::true_type{})
                                                       : kernel_of(positions, channels, std::false_type{});
    };
    return p.channel_run == 1 ? with_channels(std::integral_constant<int, 1>{})
                              : with_channels(std::integral_constant<int, kVector>{});
  });
  const int64_t blocks = int64_t{p.tiles[0]} * p.tiles[1] * p.tiles[2] * (p.one_by_one ? 4 : 1);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  const int64_t most = kMostBlocks / blocks;
  cudaError_t error = cudaSuccess;
  for (int64_t rest = p.batch; rest > 0 && error == cudaSuccess; rest -= most) {
    error = launch_blocks(kernel, blocks * (rest < most ? rest : most), kCrossThreads, shared_floats, stream, p);
    p.image.elements = p.image.elements + most * p.image.batch;
    for (Map& sequence : p.sequences) sequence.elements = sequence.elements + most * sequence.batch;
  }
  return error;
}

}  // namespace mobilemamba
