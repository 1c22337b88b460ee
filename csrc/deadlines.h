// When waiting ends, and whose fault it is. Of an exchange's timeout,
//
//   60 % pass in patience; then the peers it waits for are asked whether they are there.
//   90 %: a peer that has not answered is blamed: its process is stopped, or its host is gone.
//   95 %: a peer that answered and waits for nobody is blamed: it has not posted its side.
//  100 %: the others wait for somebody themselves, and the news of who it is should have come by
//         now. It has not: the peer of the oldest unfinished message is blamed.
//
// The steps between make the rank next to the culprit speak first, and all ranks repeat its words.

#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "acceptor.h"
#include "link.h"
#include "ring.h"

namespace ringkern {

using Links = std::vector<std::unique_ptr<Link>>;  // by rank; none for this rank itself

// Used under the loop's mutex only.
class Deadlines {
 public:
  Deadlines(Ring& ring, const Links& links, const Acceptor& acceptor);

  // To be called when an exchange has been posted. One timer serves them all: they have the same
  // timeout, so the oldest is always the next to be late.
  void arm();

 private:
  void check();
  void check(const Ledger::Entry& entry, Clock::time_point now);
  std::vector<Link*> waiting_for(Ticket ticket) const;
  [[noreturn]] void blame(const Link& link, Clock::duration age, const std::string& cause) const;
  [[noreturn]] void blame_oldest(const Link& link, Clock::duration age) const;
  Clock::duration part(int percent) const { return Clock::duration(ring_.timeout) / 100 * percent; }

  Ring& ring_;
  const Links& links_;
  const Acceptor& acceptor_;
  bool armed_ = false;
};

}  // namespace ringkern
