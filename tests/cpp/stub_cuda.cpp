// A driver without a GPU: streams, events and graphs as the CUDA driver orders them.

#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>

#include "stub_driver.h"
#include "stub_gpu.h"

namespace stub {

void reset_driver() {
  const Lock lock(world().mutex);
  world().failures.clear();
  world().violations.clear();
  world().journal.clear();
  world().let.clear();
}

void fail(const std::string& function, int result, int times) {
  const Lock lock(world().mutex);
  world().failures[function] = {result, times};
}

std::uintptr_t make_stream() {
  const Lock lock(world().mutex);
  void* const handle = new_handle();
  world().streams[handle];
  return reinterpret_cast<std::uintptr_t>(handle);
}

void destroy_stream(std::uintptr_t stream) {
  const Lock lock(world().mutex);
  world().streams.erase(reinterpret_cast<void*>(stream));
}

void enqueue(std::uintptr_t stream, const MakeWork& make) {
  const Lock lock(world().mutex);
  put(world().streams.at(reinterpret_cast<void*>(stream)), make);
}

bool drained(std::uintptr_t stream) {
  const Lock lock(world().mutex);
  pump();
  return world().streams.at(reinterpret_cast<void*>(stream)).work.empty();
}

std::size_t pending() {
  const Lock lock(world().mutex);
  pump();
  std::size_t count = 0;
  for (const auto& [handle, stream] : world().streams) count += stream.work.size();
  return count;
}

void begin_capture(std::uintptr_t stream) {
  const Lock lock(world().mutex);
  world().streams.at(reinterpret_cast<void*>(stream)).capturing = true;
}

void hold_frees(bool held) { frees_held = held; }

void hold_queries(bool held) { queries_held = held; }

bool captures(std::uintptr_t stream) {
  const Lock lock(world().mutex);
  return world().streams.at(reinterpret_cast<void*>(stream)).capturing;
}

std::vector<MakeWork> end_capture(std::uintptr_t stream) {
  const Lock lock(world().mutex);
  static_cast<void>(stream);
  for (auto& [handle, state] : world().streams) state.capturing = false;
  return std::move(world().graph);
}

void run_graph(const std::vector<MakeWork>& graph, std::uintptr_t stream) {
  for (const auto& make : graph) enqueue(stream, make);
}

void reserve(std::uintptr_t stream, bool reserved) {
  const Lock lock(world().mutex);
  if (auto* state = find_stream(reinterpret_cast<void*>(stream))) state->reserved = reserved;
}

std::vector<std::string> driver_violations() {
  const Lock lock(world().mutex);
  return world().violations;
}

void violate(const std::string& words) {
  const Lock lock(world().mutex);
  note(words);
}

void let_copies(const std::string& kind, int count) {
  const Lock lock(world().mutex);
  world().let.erase(kind);
  if (count >= 0) world().let[kind] = count;
}

void write(const Entry& entry) {
  const Lock lock(world().mutex);
  world().journal.push_back(entry);
}

std::vector<Entry> journal() {
  const Lock lock(world().mutex);
  return world().journal;
}

int questions() {
  const Lock lock(world().mutex);
  return world().questions;
}

int pinned_alive() {
  const Lock lock(world().mutex);
  return static_cast<int>(world().pinned.size());
}

int events_alive() {
  const Lock lock(world().mutex);
  return static_cast<int>(world().events.size());
}

int streams_alive() {
  const Lock lock(world().mutex);
  return static_cast<int>(world().streams.size());
}

int contexts_retained() {
  const Lock lock(world().mutex);
  return world().retained;
}

int latest_priority() {
  const Lock lock(world().mutex);
  return world().latest_priority;
}

unsigned latest_flags() {
  const Lock lock(world().mutex);
  return world().latest_flags;
}

}  // namespace stub

// ---- the driver's interface

#define ENTER(function)           \
  const Lock lock(world().mutex); \
  if (int result = 0; injected(function, &result)) return result

extern "C" {

// For a test that has loaded the stub and is not linked with it.
STUB_API void stub_cuda_fail(const char* function, int result) { stub::fail(function, result); }

STUB_API int cuInit(unsigned) {
  ENTER("cuInit");
  return 0;
}

STUB_API int cuDriverGetVersion(int* version) {
  *version = 12040;
  return 0;
}

STUB_API int cuGetErrorName(int code, const char** name) {
  if (code == 100) return *name = "CUDA_ERROR_NO_DEVICE", 0;
  if (code == kInvalidHandle) return *name = "CUDA_ERROR_INVALID_HANDLE", 0;
  if (code == 700) return *name = "CUDA_ERROR_ILLEGAL_ADDRESS", 0;
  return *name = nullptr, kInvalidValue;
}

STUB_API int cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount");
  *count = kDevices;
  return 0;
}

STUB_API int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
  *device = ordinal;
  return 0;
}

STUB_API int cuDevicePrimaryCtxRetain(void** context, int) {
  ENTER("cuDevicePrimaryCtxRetain");
  ++world().retained;
  *context = kContext;
  return 0;
}

STUB_API int cuDevicePrimaryCtxRelease_v2(int) {
  const Lock lock(world().mutex);
  --world().retained;
  return 0;
}

STUB_API int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return 0;
}

STUB_API int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}

#ifndef STUB_INCOMPLETE
STUB_API int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
#endif

STUB_API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}

STUB_API int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  ENTER("cuStreamCreateWithPriority");
  need_context("cuStreamCreateWithPriority");
  *stream = new_handle();
  world().streams[*stream];
  world().latest_priority = priority;
  world().latest_flags = flags;
  return 0;
}

STUB_API int cuStreamDestroy_v2(void* stream) {
  const Lock lock(world().mutex);
  return world().streams.erase(stream) == 1 ? 0 : kInvalidHandle;
}

STUB_API int cuStreamQuery(void* handle) {
  ENTER("cuStreamQuery");
  pump();
  const auto* stream = find_stream(handle);
  if (stream == nullptr) return kInvalidHandle;
  return stream->work.empty() ? 0 : kNotReady;
}

STUB_API int cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
  ENTER("cuStreamWaitEvent");
  need_context("cuStreamWaitEvent");
  auto* stream = find_stream(handle);
  const auto found = world().events.find(event_handle);
  if (stream == nullptr || found == world().events.end()) return kInvalidHandle;
  const EventState& event = found->second;
  if (stream->reserved) note("cuStreamWaitEvent on a stream that NCCL is at work with");
  if (event.captured) {
    stream->capturing = true;  // the order of the graph is the order of capture
    return 0;
  }
  if (stream->capturing) return kIsolation;
  const auto until = event.recorded;
  stream->work.push_back([event_handle, until] {
    const auto it = world().events.find(event_handle);
    return it == world().events.end() || it->second.passed >= until;
  });
  return 0;
}

STUB_API int cuStreamIsCapturing(void* handle, int* status) {
  ENTER("cuStreamIsCapturing");
  const auto* stream = find_stream(handle);
  if (stream == nullptr) return kInvalidHandle;
  *status = stream->capturing ? 1 : 0;
  return 0;
}

STUB_API int cuEventCreate(void** event, unsigned) {
  ENTER("cuEventCreate");
  need_context("cuEventCreate");
  *event = new_handle();
  world().events[*event];
  return 0;
}

STUB_API int cuEventDestroy_v2(void* event) {
  const Lock lock(world().mutex);
  return world().events.erase(event) == 1 ? 0 : kInvalidHandle;
}

STUB_API int cuEventRecord(void* event_handle, void* handle) {
  ENTER("cuEventRecord");
  need_context("cuEventRecord");
  auto* stream = find_stream(handle);
  const auto found = world().events.find(event_handle);
  if (stream == nullptr || found == world().events.end()) return kInvalidHandle;
  if (stream->reserved) note("cuEventRecord on a stream that NCCL is at work with");
  EventState& event = found->second;
  event.captured = stream->capturing;
  if (event.captured) return 0;
  const auto number = ++event.recorded;
  stream->work.push_back([event_handle, number] {
    const auto it = world().events.find(event_handle);
    if (it != world().events.end()) it->second.passed = std::max(it->second.passed, number);
    return true;
  });
  return 0;
}

STUB_API int cuEventQuery(void* event_handle) {
  while (queries_held) std::this_thread::yield();
  ENTER("cuEventQuery");
  need_context("cuEventQuery");
  ++world().questions;
  if (any_capture() && capture_mode != 2) note("cuEventQuery while a thread captures");
  pump();
  const auto found = world().events.find(event_handle);
  if (found == world().events.end()) return kInvalidHandle;
  if (found->second.captured) return note("cuEventQuery of a captured event"), kCapturedEvent;
  return found->second.passed >= found->second.recorded ? 0 : kNotReady;
}

STUB_API int cuMemHostAlloc(void** memory, std::size_t nbytes, unsigned) {
  ENTER("cuMemHostAlloc");
  need_context("cuMemHostAlloc");
  auto* const pinned = new char[nbytes];
  fill(pinned, nbytes);
  world().pinned[pinned] = nbytes;
  world().journal.push_back({"alloc", pinned, nullptr, nbytes});
  return *memory = pinned, 0;
}

STUB_API int cuMemFreeHost(void* memory) {
  while (frees_held) std::this_thread::yield();
  const Lock lock(world().mutex);
  auto* const pinned = static_cast<char*>(memory);
  const auto found = world().pinned.find(pinned);
  if (found == world().pinned.end()) return kInvalidValue;
  const auto copy = world().copying.lower_bound(pinned);
  if (copy != world().copying.end() && *copy < pinned + found->second) {
    note("cuMemFreeHost of memory that the GPU copies");
  }
  world().journal.push_back({"free", pinned, nullptr, found->second});
  world().pinned.erase(found);
  delete[] pinned;
  return 0;
}

// What a copy will overwrite, and what a copy has taken, is poisoned: nobody may see it.
STUB_API int cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t nbytes, void* stream) {
  ENTER("cuMemcpyDtoHAsync");
  need_context("cuMemcpyDtoHAsync");
  check_pinned("cuMemcpyDtoHAsync", to, nbytes);
  fill(to, nbytes);
  return put_copy("DtoH", stream, {"", to, bytes(from), nbytes},
                  [=] { std::memcpy(to, bytes(from), nbytes); });
}

STUB_API int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void* from, std::size_t nbytes,
                                  void* stream) {
  ENTER("cuMemcpyHtoDAsync");
  need_context("cuMemcpyHtoDAsync");
  check_pinned("cuMemcpyHtoDAsync", from, nbytes);
  return put_copy("HtoD", stream, {"", from, bytes(to), nbytes}, [=] {
    std::memcpy(bytes(to), from, nbytes);
    fill(const_cast<void*>(from), nbytes);
  });
}

STUB_API int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t nbytes,
                                  void* stream) {
  ENTER("cuMemcpyDtoDAsync");
  need_context("cuMemcpyDtoDAsync");
  return put_copy("DtoD", stream, {"", nullptr, bytes(to), nbytes},
                  [=] { std::memcpy(bytes(to), bytes(from), nbytes); });
}

}  // extern "C"
