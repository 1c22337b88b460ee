// How one rank of a ring passes buffers to the others. Implemented by tcp.cpp for host memory, and
// by nccl.cpp and staging.cpp for a GPU's.
//
// Layering: this directory knows ranks, bytes and streams. It does not know tensors, torch,
// attention or Python; only bind.cpp includes Python headers.

#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace ringkern {

// A CUDA stream as an integer; 0 is CUDA's default stream, so it does not mean "host".
// A transport moves either device or host memory, as it was made; for host it is ignored.
using Stream = std::uintptr_t;

// Names a posted exchange. Tickets are given in order; they may complete in another order.
using Ticket = std::uint64_t;

struct Send {
  int peer;
  const void* data;
  std::size_t nbytes;
};

struct Recv {
  int peer;
  void* data;
  std::size_t nbytes;
};

// When an exchange was posted and when its last byte moved: CLOCK_MONOTONIC, which is what
// Python's time.monotonic_ns() reads. done_ns is 0 where wait() returns before that.
struct Times {
  std::int64_t posted_ns = 0;
  std::int64_t done_ns = 0;
};

// What one rank has moved, payload bytes only, headers not counted.
struct Stats {
  std::vector<std::uint64_t> bytes_sent;      // by peer
  std::vector<std::uint64_t> bytes_received;  // by peer
  std::uint64_t messages_sent = 0;
  std::uint64_t messages_received = 0;
  std::uint64_t rejected_connections = 0;  // clients that failed the handshake
};

class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;  // closes

  // Posts messages to and from any other ranks; all of them progress together.
  //
  // Between two ranks messages match in the order posted, and sizes must be equal on both ends;
  // a size of zero is a message like any other. The buffers belong to the caller and must stay as
  // they are until wait() returns or throws for the ticket. Throws ArgumentError before anything
  // is posted.
  virtual Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                          Stream stream) = 0;

  // Returns true once wait(ticket) will not block, false after at most `slice`. For callers that
  // must look up now and then, as Python does for Ctrl-C.
  virtual bool poll(Ticket ticket, std::chrono::milliseconds slice) = 0;

  // Returns when the exchange is done, and forgets the ticket: a ticket is waited for once, from
  // any thread, in any order.
  //
  // Throws TransportError or a class below it when the ring has failed; then no thread touches a
  // caller's buffer any more, and every later call throws the same first error on this rank.
  // Every rank's error names the same rank as its origin. A GPU that does not come to an end may
  // touch buffers for longer: those of tickets after DeviceTransport::settled().
  virtual Times wait(Ticket ticket, Stream stream) = 0;

  // Fails the ring on every rank, with this rank as the origin. Any thread may call it.
  virtual void abort(const std::string& reason) = 0;

  // Leaves the ring: says goodbye to the peers and frees threads and sockets. Any thread may call
  // it, more than once, also after a failure. What is still pending fails on both ends.
  virtual void close() = 0;

  virtual Stats stats() const = 0;
};

// One leg of a piece of a message between a GPU and another rank: a copy to or from the host's
// memory, or the wire. By the host's clock, as Times: from when it could begin until it was seen to
// be over.
struct Leg {
  enum class Kind { kToHost, kOut, kIn, kToDevice };
  Kind kind;
  int peer;
  std::size_t nbytes;
  std::int64_t begun_ns;
  std::int64_t ended_ns;
};

// A Transport whose buffers are a GPU's memory, and whose wait() makes a stream wait instead of the
// caller where it can.
class DeviceTransport : public Transport {
 public:
  // The newest ticket up to which no exchange touches a buffer any more. wait() says nothing about
  // this: the GPU comes to it later. Keep the buffers of newer tickets alive, waited for or not.
  virtual Ticket settled() = 0;

  // What the caller puts on the stream between the two calls is watched like an exchange with all
  // other ranks: a run of a graph that has exchanges in it, which nobody can see there. Throws
  // UnsupportedError where exchanges cannot be part of graphs.
  virtual Ticket begin_run(Stream stream) {
    static_cast<void>(stream);
    throw UnsupportedError("CUDA graphs: want a ring over NCCL, got one over TCP.");
  }
  virtual void end_run(Ticket ticket, Stream stream) {
    static_cast<void>(ticket);
    static_cast<void>(stream);
  }

  // The legs that ended since the last call, oldest first; recorded from the first call on, and no
  // more than the latest 131072. None where the host's memory is not on the way.
  virtual std::vector<Leg> legs() { return {}; }

  // The same ring for host memory: it fails when this one does, and the other way round. All ranks
  // make their calls to both in one order. Not to be closed; it lives as long as this one.
  virtual Transport& host() = 0;
};

}  // namespace ringkern
