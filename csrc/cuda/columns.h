// One way to give threads the elements of maps: a thread has one channel and one column and goes down a strip of rows.
//
// Threads that follow each other have channels that do where those are dense (channels-last), else columns and then
// channels: both layouts are read and written in whole sectors without shared memory.
#pragma once

#include "cuda/device.h"

namespace mobilemamba {

struct Columns {
  static constexpr int kThreads = 256;

  int64_t batch, channels, rows, columns;
  int64_t strip;  // rows of a thread
  bool channels_inside;

  ANYWHERE int64_t strips() const { return (rows + strip - 1) / strip; }
  ANYWHERE int64_t blocks() const { return (channels * columns + kThreads - 1) / kThreads; }  // of a strip
  ANYWHERE int64_t items() const { return batch * strips() * blocks(); }
};

struct Column {
  int64_t batch, channel, column, begin, end;  // rows [begin, end); none where the thread has nothing to do

  __device__ Column(const Columns& c, int64_t item) {
    const int64_t blocks = c.blocks(), i = item % blocks * Columns::kThreads + threadIdx.x;
    const int64_t inner = c.channels_inside ? c.channels : c.columns;
    int64_t high, low;
    if (c.channels * c.columns <= UINT32_MAX) {
      high = static_cast<uint32_t>(i) / static_cast<uint32_t>(inner);
      low = static_cast<uint32_t>(i) % static_cast<uint32_t>(inner);
    } else {
      high = i / inner, low = i % inner;
    }
    channel = c.channels_inside ? low : high, column = c.channels_inside ? high : low;
    const int64_t strip = item / blocks;
    batch = strip / c.strips();
    begin = strip % c.strips() * c.strip;
    end = i < c.channels * c.columns ? (begin + c.strip < c.rows ? begin + c.strip : c.rows) : begin;
  }
};

}  // namespace mobilemamba
