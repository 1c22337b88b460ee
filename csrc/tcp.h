// A ring of ranks over TCP sockets and host memory.

#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "handshake.h"
#include "socket.h"
#include "transport.h"

namespace ringkern {

struct TcpOptions {
  // Of each exchange, after it was posted, and of connecting with the neighbours.
  std::chrono::milliseconds timeout{60000};
  // Data sockets between two ranks, 1 to 16. More than one helps where one flow cannot fill the
  // link; it does not on one host.
  int lanes = 1;
  // CRC-32C over every payload; all ranks must choose the same.
  bool checksum = false;
  // Called every 100 ms while make_tcp() waits for the neighbours; may throw to give up.
  std::function<void()> on_idle;
};

// Joins the ring and returns when the links to both neighbours are up; other links are made when
// first used. Takes the listener, whose address must be addresses[rank] as the others see it. The
// ring id tells this ring from others, the secret (32 bytes or more) proves that a peer belongs to
// it; both are the same on all ranks.
std::unique_ptr<Transport> make_tcp(Listener listener, int rank,
                                    const std::vector<std::string>& addresses,
                                    const RingId& ring_id, Bytes secret, const TcpOptions& options);

}  // namespace ringkern
