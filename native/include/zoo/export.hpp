// The C interface: every exported function is `ZOO_EXPORT void zoo_<op>(...)` with pointers, int64_t and double only.
// Python has checked shapes, dtypes, devices and index ranges before it calls.
#pragma once

#include <cstdint>

#define ZOO_EXPORT extern "C" __attribute__((visibility("default")))
