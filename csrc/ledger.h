// What became of each posted exchange. Its own mutex, so that a waiting caller never contends with
// the bytes: it is taken after the transport's, and nothing is locked while it is held.

#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "error.h"
#include "loop.h"
#include "transport.h"

namespace ringkern {

class Ledger {
 public:
  struct Entry {
    Ticket ticket;
    Clock::time_point posted;
  };

  // A ticket that is done when `messages` of them are; at once when that is 0.
  Ticket open(std::size_t messages);
  void finish_one(Ticket ticket);

  // Ends every open ticket. Only the first failure counts; returns whether this was the first.
  bool fail(Failure failure);
  bool failed() const;
  void raise_if_failed() const;

  // The exchange that has been open for longest.
  std::optional<Entry> oldest() const;

  // Whether wait() would return, or throw, at once.
  bool is_over(Ticket ticket) const;
  // Transport::poll() and Transport::wait().
  bool poll(Ticket ticket, std::chrono::milliseconds slice) const;
  Times wait(Ticket ticket);

 private:
  struct Open {
    Clock::time_point posted;
    std::size_t messages;
  };

  bool over(Ticket ticket) const;  // needs the mutex

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  Ticket next_ = 1;
  std::map<Ticket, Open> open_;
  std::unordered_map<Ticket, Times> done_;  // until waited for
  std::optional<Failure> failure_;
};

}  // namespace ringkern
