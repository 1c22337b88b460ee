// A ring of ranks over NCCL and device memory.

#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "cuda.h"
#include "nccl_library.h"
#include "transport.h"

namespace ringkern {

struct NcclOptions {
  // Of each exchange, from when the GPU could begin it, and of connecting.
  std::chrono::milliseconds timeout{45000};
  // The control ring's own timeout. It is what the control ring gets on top to find out whose fault
  // it is, so each is a part of what the caller allows.
  std::chrono::milliseconds control_timeout{15000};
  // How many thread blocks NCCL takes from the GPU; 0 leaves it to NCCL. The same on all ranks.
  int min_ctas = 0;
  int max_ctas = 0;
  // How many channels serve one peer on another host; 0 leaves it to NCCL, which thinks of
  // all-to-alls. More can help a ring. Needs NCCL 2.28.3.
  int channels_per_net_peer = 0;
  // Called every 100 ms while make_nccl() waits for the other ranks; may throw to give up.
  std::function<void()> on_idle;
};

// Joins the ring and returns when all ranks have. `control` is a ring of the same ranks over TCP:
// it brings the ranks together, and carries what went wrong and where to all of them. Throws what
// Transport::wait() does, and UnsupportedError.
//
// On top of what Transport says:
//
// exchange() puts the messages on a stream of the transport's own, behind what is on the caller's
// stream. A rank may exchange with itself: as many sends as receives, of the same sizes in the same
// order. wait() makes the stream that it is given wait, and not the calling thread; the times of
// an exchange that the GPU has not done by then have no done_ns, 0. On a stream that captures a
// graph, exchange() and wait() become part of the graph; the buffers are then the graph's for as
// long as it is, and stats() counts the capture only. begin_run() and end_run() put the deadline on
// a run of it.
//
// Calls are ordered by the caller: every rank posts the same exchanges in the same order.
//
// close() lets exchanges end for which a stream waits, and cuts off the others.
std::unique_ptr<DeviceTransport> make_nccl(std::unique_ptr<Transport> control, int rank,
                                           int world_size, std::shared_ptr<const NcclLibrary> nccl,
                                           std::shared_ptr<const Driver> driver, int device,
                                           const NcclOptions& options);

}  // namespace ringkern
