// What one rank has moved so far, added up by whoever moved it. Its own mutex, held for sums alone.

#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "transport.h"

namespace ringkern {

class Tally {
 public:
  explicit Tally(int world_size) {
    stats_.bytes_sent.resize(static_cast<std::size_t>(world_size));
    stats_.bytes_received.resize(static_cast<std::size_t>(world_size));
  }

  void add(const std::vector<Send>& sends, const std::vector<Recv>& recvs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Send& send : sends) {
      stats_.bytes_sent[static_cast<std::size_t>(send.peer)] += send.nbytes;
    }
    for (const Recv& recv : recvs) {
      stats_.bytes_received[static_cast<std::size_t>(recv.peer)] += recv.nbytes;
    }
    stats_.messages_sent += sends.size();
    stats_.messages_received += recvs.size();
  }

  // With what the host's side of the ring says of connections.
  Stats read(const Transport& host) const {
    Stats stats;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stats = stats_;
    }
    stats.rejected_connections = host.stats().rejected_connections;
    return stats;
  }

 private:
  mutable std::mutex mutex_;
  Stats stats_;
};

}  // namespace ringkern
