// The open door: accepts connections, lets those in that pass the handshake, and counts the others.
// Strangers cost a descriptor and a few bytes each, up to a limit; they never fail the ring.

#pragma once

#include <functional>
#include <list>
#include <string>
#include <vector>

#include "greeting.h"
#include "handshake.h"
#include "loop.h"
#include "socket.h"

namespace ringkern {

// Used under the loop's mutex only.
class Acceptor : private Handler {
 public:
  // Clients that named a rank and failed: what a rank that never arrived may have stumbled over.
  struct Suspicion {
    int count = 0;
    std::string why;  // of the latest
  };

  // `is_free` says whether a place is still to be taken; `admit` takes it.
  Acceptor(Loop& loop, Listener listener, const Terms& terms, int rank, const Secret& secret,
           std::chrono::milliseconds handshake_timeout, std::function<bool(const Place&)> is_free,
           std::function<void(const Place&, Socket)> admit);
  ~Acceptor() override;

  std::uint64_t rejected() const { return rejected_; }
  const Suspicion& suspicion(int rank) const { return suspicions_[static_cast<std::size_t>(rank)]; }

 private:
  struct Client;
  using Clients = std::list<std::unique_ptr<Client>>;

  void on_events(std::uint32_t events) override;
  void rest();
  void advance(Clients::iterator client);
  void drop(Clients::iterator client, const std::string& why);

  Loop& loop_;
  Listener listener_;
  const Terms terms_;
  const int rank_;
  const Secret& secret_;
  const std::chrono::milliseconds handshake_timeout_;
  const std::function<bool(const Place&)> is_free_;
  const std::function<void(const Place&, Socket)> admit_;
  const std::size_t most_clients_;
  Clients clients_;  // the oldest first
  std::vector<Suspicion> suspicions_;
  std::uint64_t rejected_ = 0;
  Watch watch_;
  Loop::Timer rest_;
};

}  // namespace ringkern
