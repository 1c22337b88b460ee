// What became of each exchange that a GPU does: which are in flight, and which of them the caller
// has made a stream wait for. Its own mutex, under which only the driver is called.

#pragma once

#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda.h"
#include "loop.h"
#include "transport.h"

namespace ringkern {

struct Flight {
  Clock::time_point posted;
  std::unique_ptr<Event> ready;  // the caller's stream has come to it; none: it always has
  std::unique_ptr<Event> done;   // it is over, once `launched`; none: it is connecting
  std::vector<int> peers;        // without this rank itself
  std::size_t bytes_out = 0;
  std::size_t bytes_in = 0;
  std::optional<Clock::time_point> started{};  // when it was first seen ready
  bool launched = false;
  bool waited = false;
  bool captured = false;  // into a graph: nobody may ask for its events
  bool is_run = false;    // of a graph: on the caller's own stream, and nobody waits for it

  // Enters the peers and the bytes of an exchange of this rank.
  void describe(int rank, const std::vector<Send>& sends, const std::vector<Recv>& recvs);
};

// Every function needs a Device::Use on the calling thread.
class Flights {
 public:
  explicit Flights(const Device& device) : device_(device) {}

  // With both events, used or new.
  Flight prepare();
  Ticket open(Flight flight);
  // A ticket that is done.
  Ticket open_done();
  // The exchange, or the run of a graph, is on the stream, and `done` is recorded behind it.
  void launch(Ticket ticket, Stream stream);
  // The exchange is in a graph: nobody can ask whether it is over, and it runs any number of times.
  void capture(Ticket ticket, Stream stream);
  // No capture is under way any more: nobody can wait for what was in one.
  void end_captures();
  // Forgets a ticket that nobody will wait for.
  void drop(Ticket ticket);

  // Notices what is over.
  void reap();
  // Makes the stream wait for the exchange and forgets the ticket. None after clear().
  // UnsupportedError where the stream captures, and the exchange is in flight outside of the graph.
  std::optional<Times> wait(Ticket ticket, Stream stream);

  std::size_t size() const;
  // Whether the GPU has done all that was launched.
  bool landed() const;
  // Whether a stream still waits for an exchange.
  bool awaited() const;
  // The newest ticket up to which all are over.
  Ticket settled() const;

  struct Oldest {
    Ticket ticket;
    Clock::duration age;  // since the GPU could begin
    std::vector<int> peers;
    std::string text;  // "exchange 7 (10 bytes to and 20 bytes from rank 3), open for 1.5 s"
  };
  // The exchange that the stream is at, if the caller's own work has let it begin.
  std::optional<Oldest> oldest();

  // The stream is empty, whatever was on it.
  void clear();

 private:
  std::unique_ptr<Event> take_event();

  const Device& device_;
  mutable std::mutex mutex_;
  Ticket last_ = 0;
  std::map<Ticket, Flight> flights_;
  std::unordered_map<Ticket, Times> done_;      // until waited for
  std::map<Ticket, Flight> captured_;           // until waited for
  std::vector<std::unique_ptr<Event>> events_;  // free ones
  bool cleared_ = false;
};

}  // namespace ringkern
