// An NCCL whose ranks are threads of one process, on top of the stub driver: messages match by pair
// and order, unequal sizes never match, and nothing ends by itself.

#include "stub_comm.h"

namespace stub {

void reset_nccl() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().version = 22809;
  world().progress = 0;
  world().held.clear();
  world().failures.clear();
  world().calls.clear();
  world().errors.clear();
  world().messages.clear();
  world().latest.clear();
  world().changed.notify_all();
}

void set_version(int version) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().version = version;
}

void fail_nccl(const std::string& function, int result, int times) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().failures[function] = {result, times};
}

void set_progress(int questions) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().progress = questions;
}

void set_async_error(int rank, int result) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().errors[rank] = result;
}

void hold(const std::string& function) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().held = function;
}

void release() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().held.clear();
  world().changed.notify_all();
}

int calls(const std::string& function) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().calls[function];
}

std::vector<std::string> messages(int rank) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().messages[rank];
}

void end_graphs() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  for (const auto& comm : world().comms) comm->in_graph = false;
  world().changed.notify_all();
}

Config config(int rank) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().latest.at(rank)->config;
}

}  // namespace stub

// ---- NCCL's interface

extern "C" {

struct UniqueId {
  char bytes[128];
};

// ncclConfig_t of 2.28.
struct FullConfig {
  std::size_t size;
  unsigned magic, version;
  int blocking, cgaClusterSize, minCTAs, maxCTAs;
  const char* netName;
  int splitShare, trafficClass;
  const char* commName;
  int collnetEnable, CTAPolicy, shrinkShare, nvlsCTAs, nChannelsPerNetPeer, nvlinkCentricSched;
};

// For a test that has loaded the stub and is not linked with it.
STUB_API void stub_nccl_version(int version) { stub::set_version(version); }
STUB_API void stub_nccl_fail(const char* function, int result) {
  stub::fail_nccl(function, result);
}

STUB_API int ncclGetVersion(int* version) {
  ENTER("ncclGetVersion");
  const std::lock_guard<std::mutex> lock(world().mutex);
  *version = world().version;
  return 0;
}

STUB_API const char* ncclGetErrorString(int result) {
  return result == 6 ? "remote process exited or there was a network error" : "some error";
}

STUB_API const char* ncclGetLastError(void*) { return "the stub's last words"; }

STUB_API int ncclGetUniqueId(UniqueId* id) {
  ENTER("ncclGetUniqueId");
  const std::lock_guard<std::mutex> lock(world().mutex);
  std::memset(id->bytes, 0, sizeof(id->bytes));
  const std::string text = "clique " + std::to_string(world().next_id++);
  std::memcpy(id->bytes, text.data(), text.size());
  id->bytes[127] = 'x';  // the last byte travels too
  return 0;
}

STUB_API int ncclCommInitRankConfig(void** handle, int ranks, UniqueId id, int rank,
                                    FullConfig* config) {
  ENTER("ncclCommInitRankConfig");
  if (id.bytes[127] != 'x') return kInvalidArgument;
  if (config->minCTAs > config->maxCTAs) return kInvalidArgument;  // undefined is below all
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().comms.push_back(std::make_unique<Comm>());
  Comm* const comm = world().comms.back().get();
  comm->rank = rank;
  comm->ranks = ranks;
  comm->id = id.bytes;
  const auto& it = *config;
  comm->config = {it.size,
                  it.magic,
                  it.version,
                  it.blocking,
                  it.minCTAs,
                  it.maxCTAs,
                  it.nChannelsPerNetPeer,
                  it.nvlinkCentricSched};
  auto& joined = world().joined[comm->id];
  comm->clique = joined.empty() ? std::make_shared<Clique>() : joined.front()->clique;
  joined.push_back(comm);
  world().latest[rank] = comm;
  *handle = comm;
  return kInProgress;
}

STUB_API int ncclCommGetAsyncError(void* handle, int* state) {
  ENTER("ncclCommGetAsyncError");
  auto* const comm = static_cast<Comm*>(handle);
  const Inside inside(comm, "ncclCommGetAsyncError");
  std::function<void()> begin;
  {
    const std::lock_guard<std::mutex> lock(world().mutex);
    *state = 0;
    if (const int error = world().errors[comm->rank]) return *state = error, 0;
    if (static_cast<int>(world().joined[comm->id].size()) < comm->ranks) *state = kInProgress;
    if (comm->questions > 0 && --comm->questions > 0) *state = kInProgress;
    if (*state == 0) std::swap(begin, comm->begin);
  }
  if (begin) begin();
  return 0;
}

STUB_API int ncclGroupStart() {
  ENTER("ncclGroupStart");
  if (group.depth++ > 0) stub::violate("a group inside a group");
  return 0;
}

STUB_API int ncclSend(const void* data, std::size_t count, int type, int peer, void* comm,
                      void* on) {
  ENTER("ncclSend");
  return add(true, const_cast<char*>(static_cast<const char*>(data)), count, type, peer, comm, on);
}

#ifndef STUB_INCOMPLETE
STUB_API int ncclRecv(void* data, std::size_t count, int type, int peer, void* comm, void* on) {
  ENTER("ncclRecv");
  return add(false, static_cast<char*>(data), count, type, peer, comm, on);
}

STUB_API int ncclCommRevoke(void*, int) { return kInvalidUsage; }
#endif

STUB_API int ncclGroupEnd() {
  const Group built = std::move(group);
  group = Group();
  Comm* const comm = built.comm;
  if (comm == nullptr) {
    ENTER("ncclGroupEnd");
    return 0;
  }
  const Inside inside(comm, "ncclGroupEnd");
  ENTER("ncclGroupEnd");
  const auto stream = reinterpret_cast<std::uintptr_t>(built.stream);
  if (stub::captures(stream)) comm->in_graph = true;
  const auto begin = [comm, parts = built.parts, stream] {
    stub::enqueue(stream, [comm, parts] { return run_group(comm, parts); });
    stub::reserve(stream, false);
  };
  {
    const std::lock_guard<std::mutex> lock(world().mutex);
    if (world().progress > 0) {
      comm->questions = world().progress;
      comm->begin = begin;
      stub::reserve(stream, true);
      return kInProgress;
    }
  }
  begin();
  return 0;
}

STUB_API int ncclCommFinalize(void* handle) {
  auto* const comm = static_cast<Comm*>(handle);
  const Inside inside(comm, "ncclCommFinalize");
  ENTER("ncclCommFinalize");
  if (comm->in_graph) stub::violate("ncclCommFinalize with a graph, which it waits for");
  const std::lock_guard<std::mutex> lock(world().mutex);
  comm->questions = world().progress + 1;
  return kInProgress;
}

STUB_API int ncclCommDestroy(void* handle) {
  auto* const comm = static_cast<Comm*>(handle);
  const Inside inside(comm, "ncclCommDestroy");
  ENTER("ncclCommDestroy");
  comm->ended = true;
  return 0;
}

STUB_API int ncclCommAbort(void* handle) {
  auto* const comm = static_cast<Comm*>(handle);
  const Inside inside(comm, "ncclCommAbort");
  ENTER("ncclCommAbort");
  comm->aborted = true;  // kernels end; what follows waits for graphs, and asks nobody
  std::unique_lock<std::mutex> lock(world().mutex);
  world().changed.wait(lock, [&] { return !comm->in_graph; });
  comm->ended = true;
  return 0;
}

}  // extern "C"
