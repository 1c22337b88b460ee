// The stubs for a test in Python, which loads them as one library.

#include "stub_gpu.h"

extern "C" {

STUB_API std::uintptr_t stub_make_stream() { return stub::make_stream(); }
STUB_API void stub_destroy_stream(std::uintptr_t stream) { stub::destroy_stream(stream); }
STUB_API int stub_drained(std::uintptr_t stream) { return stub::drained(stream) ? 1 : 0; }
STUB_API int stub_violations() { return static_cast<int>(stub::driver_violations().size()); }
STUB_API void stub_reset() {
  stub::reset_nccl();
  stub::reset_driver();
}

}  // extern "C"
