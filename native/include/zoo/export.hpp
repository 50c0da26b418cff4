// The C interface: every exported function is `ZOO_EXPORT int64_t zoo_<op>(...) try { ... return kOk; } ZOO_CATCH` with
// pointers, int64_t and double only. Python has checked shapes, dtypes, devices and sizes before it calls; what lies
// *in* an index is checked by the kernel that reads it (check.hpp), in every call, since nothing tells that it changed.
//
// No exception leaves the library, and nothing in it ends the process: Python turns the code into an OpError or a
// MemoryError.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>

#define ZOO_EXPORT extern "C" __attribute__((visibility("default")))

namespace zoo {

// In the order of CODES in shared/ops/_native.py.
enum Code : int64_t { kOk = 0, kBadPointer = 1, kBadIndex = 2, kOutOfMemory = 3, kFailed = 4 };

struct Failure {
  Code code;
};

// The code of the exception that is being handled.
inline Code code_of_exception() noexcept {
  try {
    throw;
  } catch (const Failure& failure) {
    return failure.code;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (const std::length_error&) {  // a vector longer than memory
    return kOutOfMemory;
  } catch (...) {
    return kFailed;
  }
}

}  // namespace zoo

#define ZOO_CATCH \
  catch (...) { return zoo::code_of_exception(); }
