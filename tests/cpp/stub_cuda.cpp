// A driver without a GPU: streams, events and graphs as the CUDA driver orders them.

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "stub_gpu.h"

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400;
constexpr int kNotReady = 600, kIsolation = 905, kCapturedEvent = 907;
constexpr int kDevices = 2;

struct StreamState {
  std::deque<stub::Work> work;
  bool capturing = false;
  bool reserved = false;
};

struct EventState {
  std::uint64_t recorded = 0, passed = 0;
  bool captured = false;
};

struct World {
  std::mutex mutex;
  std::map<void*, StreamState> streams;
  std::map<void*, EventState> events;
  std::map<std::string, std::pair<int, int>> failures;  // result, times
  std::vector<stub::MakeWork> graph;
  std::vector<std::string> violations;
  std::uintptr_t last_handle = 0x1000;
  int retained = 0, latest_priority = 0;
  unsigned latest_flags = 0;
};

World& world() {
  static World* const it = new World;  // threads may outlive the destructors of statics
  return *it;
}

thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;  // global

void* const kContext = reinterpret_cast<void*>(0x77);

using Lock = std::lock_guard<std::mutex>;

// Everything below needs the mutex.

bool injected(const char* function, int* result) {
  const auto found = world().failures.find(function);
  if (found == world().failures.end() || found->second.second == 0) return false;
  --found->second.second;
  *result = found->second.first;
  return true;
}

void note(const std::string& words) { world().violations.push_back(words); }

void* new_handle() { return reinterpret_cast<void*>(world().last_handle += 16); }

void pump() {
  for (bool progress = true; progress;) {
    progress = false;
    for (auto& [handle, stream] : world().streams) {
      while (!stream.work.empty() && stream.work.front()()) {
        stream.work.pop_front();
        progress = true;
      }
    }
  }
}

void put(StreamState& stream, const stub::MakeWork& make) {
  if (stream.capturing) {
    world().graph.push_back(make);
  } else {
    stream.work.push_back(make());
  }
}

StreamState* find_stream(void* handle) {
  const auto found = world().streams.find(handle);
  return found == world().streams.end() ? nullptr : &found->second;
}

bool any_capture() {
  return std::any_of(world().streams.begin(), world().streams.end(),
                     [](const auto& entry) { return entry.second.capturing; });
}

void need_context(const char* function) {
  if (contexts.empty() || contexts.back() != kContext) {
    note(std::string(function) + " without the context");
  }
}

}  // namespace

namespace stub {

void reset_driver() {
  const Lock lock(world().mutex);
  world().failures.clear();
  world().violations.clear();
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
  ENTER("cuEventQuery");
  need_context("cuEventQuery");
  if (any_capture() && capture_mode != 2) note("cuEventQuery while a thread captures");
  pump();
  const auto found = world().events.find(event_handle);
  if (found == world().events.end()) return kInvalidHandle;
  if (found->second.captured) return note("cuEventQuery of a captured event"), kCapturedEvent;
  return found->second.passed >= found->second.recorded ? 0 : kNotReady;
}

}  // extern "C"
