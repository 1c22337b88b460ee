// What the parts of one rank's transport share. One mutex, the loop's, guards all of it and all
// links; Ledger has its own.

#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "error.h"
#include "handshake.h"
#include "ledger.h"
#include "loop.h"
#include "socket.h"
#include "transport.h"

namespace ringkern {

struct Ring {
  const int rank;
  const Terms terms;
  const std::chrono::milliseconds timeout;
  const std::vector<Address> addresses;  // by rank
  const Secret& secret;
  Loop& loop;
  Ledger& ledger;
  Stats stats;
  // Fails the ring with a reason that a peer has told. What this rank finds out itself is thrown.
  const std::function<void(Kind kind, int origin, const std::string& reason, int told_by)> fail;

  // "rank 3 of 8", as a reason begins.
  std::string me() const { return concat("rank ", rank, " of ", terms.world_size); }
  // "rank 2 (10.0.0.2:29501)"
  std::string name(int peer) const {
    return concat("rank ", peer, " (", addresses[static_cast<std::size_t>(peer)].text(), ")");
  }
};

}  // namespace ringkern
