// A ring of ranks for a GPU's memory, over a wire that moves a host's.

#pragma once

#include <chrono>
#include <cstddef>
#include <memory>

#include "cuda.h"
#include "transport.h"

namespace ringkern {

struct StagingOptions {
  // Messages go through slots of pinned memory, a piece in each; the same on all ranks. As large as
  // the wire's own pieces.
  std::size_t slot_bytes = std::size_t{1} << 20;
  // How many slots a peer gets in each direction at most: one is copied, one is on the wire, and
  // the others keep both busy when neither is even.
  int slots = 4;
  // For how long a ring that ends waits for copies that the GPU has been given.
  std::chrono::milliseconds grace{5000};
};

// Takes a ring for host memory whose ranks have joined. Throws UnsupportedError where the GPU
// cannot be used.
//
// On top of what Transport says:
//
// exchange() lets the GPU copy behind what is on the caller's stream, on streams of the transport's
// own, and returns at once; the wire's deadline counts from when the GPU has come to the exchange.
// A rank may exchange with itself: as many sends as receives, of the same sizes in the same order;
// the GPU copies them. A stream that captures a graph is refused with UnsupportedError.
//
// wait() waits until the wire is done with the exchange, which the GPU may still copy from the
// slots; for that the stream waits, and not the caller. done_ns is when the last byte was on the
// wire or came from it. An exchange with this rank alone never makes the caller wait. (A stream can
// wait for an event only once it is recorded. It could wait for a word of memory, by
// cuStreamWaitValue32; but CUDA does not see such an order, may queue the copies that would end the
// wait behind it, and then nothing ends it: the driver's documentation warns of that.)
//
// An exchange on host() waits until all pieces of earlier exchanges are on the wire. With one order
// of calls on all ranks nothing waits for ever: the slots of a piece are freed by the GPU and by
// the threads of both ends, whatever the callers do.
//
// Sizes that differ end the ring with the wire's ProtocolError on both ends; for messages of more
// than one piece it names the sizes of the first pieces that differ.
//
// close() lets the GPU end what it copies; exchanges that are not done fail on both ends.
std::unique_ptr<DeviceTransport> make_staged(std::unique_ptr<Transport> wire, int rank,
                                             int world_size, std::shared_ptr<const Driver> driver,
                                             int device, const StagingOptions& options = {});

}  // namespace ringkern
