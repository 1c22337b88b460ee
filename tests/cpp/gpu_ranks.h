// A whole ring over the stub NCCL in one process, a thread for each rank.

#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "nccl.h"
#include "ranks.h"
#include "stub_gpu.h"

namespace ringkern {

inline NcclOptions nccl_options(int timeout_ms = 20000) {
  NcclOptions options;
  options.timeout = std::chrono::milliseconds(timeout_ms);
  return options;
}

inline std::unique_ptr<DeviceTransport> join_nccl(Ports& ports, int rank,
                                                  const NcclOptions& options,
                                                  int control_ms = 20000) {
  auto both = options;
  both.control_timeout = std::chrono::milliseconds(control_ms);
  return make_nccl(ports.join(rank, test_options(1, false, control_ms)), rank,
                   static_cast<int>(ports.addresses.size()), NcclLibrary::open(""), Driver::open(),
                   0, both);
}

// Asks until it is so; fails the test after 20 seconds.
inline void until(const std::function<bool()>& done) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) throw std::runtime_error("it never came");
    std::this_thread::yield();
  }
}

inline void sync(Stream stream) {
  until([&] { return stub::drained(stream); });
}

// The watching threads have looked so often since.
inline void until_watched(int times) {
  const int before = stub::calls("ncclCommGetAsyncError");
  until([&] { return stub::calls("ncclCommGetAsyncError") >= before + times; });
}

// Work that waits until a test opens it.
struct Gate {
  std::shared_ptr<std::atomic<bool>> is_open = std::make_shared<std::atomic<bool>>(false);

  void put(Stream stream) const {
    stub::enqueue(stream, [flag = is_open] { return [flag] { return flag->load(); }; });
  }
  void open() const { *is_open = true; }
};

inline void put_work(Stream stream, const std::function<void()>& action) {
  stub::enqueue(stream, [action] { return [action] { return action(), true; }; });
}

// The stubs as they were, before and after; after, nothing may be left and nothing forbidden done.
struct CleanStubs {
  CleanStubs() {
    stub::reset_nccl();
    stub::reset_driver();
  }
  ~CleanStubs() {
    for (const auto& words : stub::driver_violations()) FAIL_CHECK(words);
    CHECK(stub::events_alive() == 0);
    CHECK(stub::streams_alive() == 0);
    CHECK(stub::contexts_retained() == 0);
  }
};

// Forms a ring, runs body(rank, ring, stream) on all ranks, and lets them leave together.
inline void run_nccl(int world_size, const NcclOptions& options,
                     const std::function<void(int, DeviceTransport&, Stream)>& body) {
  const CleanStubs clean;
  Ports ports(world_size);
  in_parallel(static_cast<std::size_t>(world_size), [&](int rank) {
    const auto ring = join_nccl(ports, rank, options);
    const Stream stream = stub::make_stream();
    body(rank, *ring, stream);
    ring->close();
    stub::destroy_stream(stream);
  });
}

}  // namespace ringkern
