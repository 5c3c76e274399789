// The activations that the convolution operators fuse.
#pragma once

#include <cstdint>

namespace mobilemamba {

enum class Activation : int8_t { kNone, kRelu, kSilu };

}  // namespace mobilemamba
