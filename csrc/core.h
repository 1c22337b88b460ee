// One rank's running ring over TCP: the loop, the links to the peers, and the first failure.

#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "acceptor.h"
#include "deadlines.h"
#include "handshake.h"
#include "ledger.h"
#include "link.h"
#include "loop.h"
#include "ring.h"
#include "socket.h"
#include "transport.h"

namespace ringkern {

// Every function may be called from any thread. Lock order: closing_, mutex_, the ledger's own.
class Core {
 public:
  Core(Listener listener, int rank, std::vector<Address> addresses, const Terms& terms,
       Bytes secret, std::chrono::milliseconds timeout);
  ~Core();

  // Begins to connect with the ring's neighbours; the ticket is done when that is.
  Ticket connect();
  // The entries have been checked.
  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs);
  // Transport::poll() and Transport::wait().
  bool poll(Ticket ticket, std::chrono::milliseconds slice);
  Times wait(Ticket ticket);
  void abort(const std::string& reason);
  void close();
  Stats stats();

 private:
  Ticket post(const std::vector<Send>& sends, const std::vector<Recv>& recvs);
  Link& link(int peer) { return *links_[static_cast<std::size_t>(peer)]; }
  void fail(const std::exception& error) noexcept;
  void fail(Kind kind, int origin, const std::string& reason, int told_by) noexcept;
  void say_goodbye();
  std::size_t ranks_here() const;  // that share this host

  const int rank_;
  FairMutex mutex_;
  const Secret secret_;
  Ledger ledger_;
  Loop loop_;
  Ring ring_;
  Links links_;
  std::unique_ptr<Acceptor> acceptor_;
  std::unique_ptr<Deadlines> deadlines_;
  std::vector<std::size_t> counts_;  // of one exchange, by peer: sends, then receives
  std::mutex closing_;
  bool closed_ = false;
};

}  // namespace ringkern
