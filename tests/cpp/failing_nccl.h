// Rings over NCCL that fail, on ranks that are threads.

#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <vector>

#include "failing_ranks.h"
#include "gpu_ranks.h"

namespace ringkern {

struct Options {
  int world_size = 3;
  int timeout_ms = 20000;
  int control_ms = 20000;
};

// Runs body(rank, ring, stream) on all ranks; it returns each rank's failure.
inline std::vector<Failure> fail_ranks(
    const Options& options, const std::function<Failure(int, DeviceTransport&, Stream)>& body) {
  std::vector<Failure> failures(static_cast<std::size_t>(options.world_size));
  Ports ports(options.world_size);
  std::atomic<int> joined{0};
  in_parallel(failures.size(), [&](int rank) {
    const auto ring = join_nccl(ports, rank, nccl_options(options.timeout_ms), options.control_ms);
    const Stream stream = stub::make_stream();
    ++joined;
    until([&] { return joined == options.world_size; });
    const Failure failure = failures[static_cast<std::size_t>(rank)] = body(rank, *ring, stream);
    check_stays_failed(*ring, failure, stream);
    ring->close();
    until([&] { return stub::drained(stream); });
    stub::destroy_stream(stream);
  });
  return failures;
}

}  // namespace ringkern
