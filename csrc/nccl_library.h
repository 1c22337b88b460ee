// NCCL, found at run time: which library, which version, which functions. What is declared here of
// its interface has the names, types and values that NVIDIA documents and keeps: the interface
// grows, and what is there stays.

#pragma once

#include <climits>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ringkern {

// ncclUniqueId: what the ranks of a communicator find each other by. Passed by value.
struct NcclId {
  char bytes[128];
};

// ncclConfig_t up to the newest field that is set here. Newer libraries take `size` bytes of it and
// leave what is newer than `version` at their defaults, older ones take the fields they know.
struct NcclConfig {
  static constexpr int kUndefined = INT_MIN;

  std::size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 0;
  int blocking = 0;  // 2.14
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;  // 2.17
  int max_ctas = kUndefined;  // 2.17
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int traffic_class = kUndefined;
  const char* comm_name = nullptr;
  int collnet_enable = kUndefined;
  int cta_policy = kUndefined;
  int shrink_share = kUndefined;
  int nvls_ctas = kUndefined;
  int channels_per_net_peer = kUndefined;  // 2.28.3
  int nvlink_centric_sched = kUndefined;   // 2.28.3
};
// NCCL takes as many bytes as it knows of, so that padding would be read as an option.
static_assert(sizeof(NcclConfig) == offsetof(NcclConfig, nvlink_centric_sched) +
                                        sizeof(NcclConfig::nvlink_centric_sched));

// A call of NCCL failed; `result` is its ncclResult_t.
struct NcclError : std::runtime_error {
  NcclError(int result, const std::string& text) : std::runtime_error(text), result(result) {}
  const int result;
};

// NCCL's functions that are used here. A communicator is an opaque pointer.
struct NcclLibrary {
  static constexpr int kSuccess = 0, kSystemError = 2, kRemoteError = 6, kInProgress = 7;
  // The first whose configuration limits the CTAs. Tested: 2.28.9.
  static constexpr int kOldest = 21701;
  static constexpr int kChannelsPerNetPeer = 22803;

  // A function that newer libraries have, for what may want it one day.
  struct Optional {
    const char* name;
    int since;
    void* address;  // null where the library has none
  };

  // Takes the copy that this process has loaded; where there is none, loads `path`, which may be
  // empty. Throws UnsupportedError when that gives no library, too old a one, or one without a
  // function that its version should have.
  static std::shared_ptr<const NcclLibrary> open(const std::string& path);

  // The function, or null where this library has none.
  void* optional(const std::string& name) const;

  // Throws NcclError unless the result of `call` is kSuccess or kInProgress.
  void check(int result, const char* call, void* comm) const;

  int version = 0;  // 22809 is 2.28.9
  std::string path;
  std::vector<Optional> optionals;

  int (*get_version)(int* version);
  const char* (*error_string)(int result);
  const char* (*last_error)(void* comm);
  int (*get_unique_id)(NcclId* id);
  int (*init)(void** comm, int ranks, NcclId id, int rank, NcclConfig* config);
  int (*get_async_error)(void* comm, int* result);
  int (*finalize)(void* comm);
  int (*destroy)(void* comm);
  int (*abort)(void* comm);
  int (*group_start)();
  int (*group_end)();
  int (*send)(const void* data, std::size_t count, int type, int peer, void* comm, void* stream);
  int (*recv)(void* data, std::size_t count, int type, int peer, void* comm, void* stream);
};

// "2.28.9" for 22809, and "2.8.4" for 2804: the code had fewer digits before 2.9.
std::string nccl_version_text(int version);

}  // namespace ringkern
