// What tests say to the stub driver and to the stub NCCL. "Device" memory is host memory, and a
// stream's work is done by whoever calls the driver next, in the stream's order: nothing happens by
// itself, so tests decide when what happens.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#define STUB_API __attribute__((visibility("default")))

namespace stub {

// Work of a stream: asked until it returns true. A run of a graph makes it anew.
using Work = std::function<bool()>;
using MakeWork = std::function<Work()>;

// ---- the driver

// Forgets all results, holds and the log.
STUB_API void reset_driver();
// The next calls of this function give this result and do nothing.
STUB_API void fail(const std::string& function, int result, int times = 1);
// A stream as a caller has one, and the end of it.
STUB_API std::uintptr_t make_stream();
STUB_API void destroy_stream(std::uintptr_t stream);
STUB_API void enqueue(std::uintptr_t stream, const MakeWork& make);
// Whether all work of the stream is done, after doing what can be done.
STUB_API bool drained(std::uintptr_t stream);
// Does what can be done, and counts what is left on all streams.
STUB_API std::size_t pending();
STUB_API void begin_capture(std::uintptr_t stream);
STUB_API bool captures(std::uintptr_t stream);
// What was captured, in order; run_graph() puts it on a stream.
STUB_API std::vector<MakeWork> end_capture(std::uintptr_t stream);
STUB_API void run_graph(const std::vector<MakeWork>& graph, std::uintptr_t stream);
// While NCCL is in progress with a stream, nobody else may put anything there.
STUB_API void reserve(std::uintptr_t stream, bool reserved);
// Calls that the driver forbids, in words.
STUB_API std::vector<std::string> driver_violations();
STUB_API void violate(const std::string& words);
// While held, cuMemFreeHost does not return, as it waits for all of the GPU's work.
STUB_API void hold_frees(bool held);
// While held, cuEventQuery does not return, as where another thread waits inside the driver.
STUB_API void hold_queries(bool held);
// So many more copies of this kind, "DtoH", "HtoD" or "DtoD", run, and then none; -1: all.
STUB_API void let_copies(const std::string& kind, int count);

// What happened, in order. The driver writes "alloc" and "free" of pinned memory, and of each copy
// "DtoH put" and "DtoH done", or HtoD or DtoD; tests add what they like.
struct Entry {
  std::string what;
  const void* host;
  const void* device;
  std::size_t nbytes;
};
STUB_API void write(const Entry& entry);
STUB_API std::vector<Entry> journal();

// How often somebody has asked for an event.
STUB_API int questions();
// What was created and not destroyed.
STUB_API int pinned_alive();
STUB_API int events_alive();
STUB_API int streams_alive();
STUB_API int contexts_retained();
// Priority and flags of the latest stream that a library created.
STUB_API int latest_priority();
STUB_API unsigned latest_flags();

// ---- NCCL

STUB_API void reset_nccl();
STUB_API void set_version(int version);
// The next calls of this function give this result; as for the driver.
STUB_API void fail_nccl(const std::string& function, int result, int times = 1);
// Each group stays in progress for so many questions, and finalize() too.
STUB_API void set_progress(int questions);
// What this rank's communicator answers from now on; 0 takes it back.
STUB_API void set_async_error(int rank, int result);
// Calls of this function do not return until release().
STUB_API void hold(const std::string& function);
STUB_API void release();
// No graph has exchanges any more: until then no communicator of theirs ends.
STUB_API void end_graphs();
// How often the function was called.
STUB_API int calls(const std::string& function);
// In the order made: "recv 1 100", "send 2 100" of this rank.
STUB_API std::vector<std::string> messages(int rank);

struct Config {
  std::size_t size;
  unsigned magic, version;
  int blocking, min_ctas, max_ctas, channels_per_net_peer, nvlink_centric_sched;
};
STUB_API Config config(int rank);

}  // namespace stub
