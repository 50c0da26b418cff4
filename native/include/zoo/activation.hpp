// What a convolution makes of a sum before it stores it: nothing, its positive part, or that up to 6. A NaN stays.
#pragma once

#include <cstdint>

namespace zoo {

enum Activation : int64_t { kNone = 0, kRelu = 1, kRelu6 = 6 };

}  // namespace zoo
