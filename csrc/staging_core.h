// One rank's running ring for a GPU's memory over a wire: the lanes, the thread that moves pieces
// through them, and the first failure.

#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cuda.h"
#include "error.h"
#include "flights.h"
#include "legs.h"
#include "loop.h"
#include "staging.h"
#include "staging_lane.h"
#include "tally.h"
#include "transport.h"

namespace ringkern {

// Every function may be called from any thread. Lock order: closing_, mutex_, the flights' own.
//
// The lanes and what they work with are the thread's alone. A flight is open until it is through,
// which is when its last copy to the GPU is on the stream and the wire has its sends; and then in
// flight until the GPU has passed that copy.
//
// The thread shares the ownership: to free pinned memory waits for all of the GPU's work, others'
// too, and when that never ends the thread is left behind with all that it frees.
class StagingCore : public std::enable_shared_from_this<StagingCore> {
 public:
  StagingCore(std::unique_ptr<Transport> wire, int rank, int world_size,
              std::shared_ptr<const Driver> driver, int device, const StagingOptions& options);
  ~StagingCore();

  // To be called once, before anything else.
  void start();
  // The entries have been checked.
  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream stream);
  // On the wire, behind all pieces of earlier exchanges.
  Ticket exchange_on_host(const std::vector<Send>& sends, const std::vector<Recv>& recvs);
  bool poll(Ticket ticket, std::chrono::milliseconds slice);
  Times wait(Ticket ticket, Stream stream);
  Ticket settled();
  void abort(const std::string& reason);
  void close();
  Stats stats() const { return tally_.read(*wire_); }
  std::vector<Leg> legs() { return legs_.take(); }
  Transport& wire() { return *wire_; }

 private:
  using Lanes = std::vector<std::unique_ptr<SlotLane>>;  // by peer, made when first used

  std::optional<Ticket> post(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                             Stream stream);
  Flight enter(Stream stream);
  void refuse_capture(Stream stream) const;
  bool copy_own(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Flight& flight);
  StagedExchange cut(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                     const Flight& flight) const;

  void check_wire() { wire_->wait(wire_->exchange({}, {}, 0), 0); }
  bool is_through(Ticket ticket) const { return over_ || open_.count(ticket) == 0; }
  void poke();
  void trouble(const std::exception& error);
  [[noreturn]] void raise();

  // The thread's.
  void run() noexcept;
  void work();
  bool take_posted();
  bool has_work() const;
  void admit(StagedExchange exchange);
  template <typename AnyLane>
  SlotLane& lane(Lanes& lanes, int peer);
  bool advance();
  void publish();
  void launch(StagedExchange& exchange);
  void rest();
  Failure blame_self(const std::string& text);
  std::string whereabouts();
  void end(Failure failure);
  bool idle() const;
  void release();

  std::string me() const { return concat("rank ", rank_, " of ", world_size_); }

  const int rank_;
  const int world_size_;
  const StagingOptions options_;
  const std::unique_ptr<Transport> wire_;
  const Device device_;
  Flights flights_;
  Tally tally_;
  Legs legs_;
  std::unique_ptr<OwnStream> own_;  // of copies from this rank to itself

  std::unique_ptr<StagingGear> gear_;
  Lanes outs_, ins_;
  Clock::time_point moved_, checked_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;     // the thread
  std::condition_variable changed_;  // callers
  std::vector<StagedExchange> posted_;
  std::set<Ticket> open_, unposted_;  // not through; not on the wire with all pieces
  std::unordered_map<Ticket, std::int64_t> done_ns_;  // of those that are through, until waited for
  std::optional<Failure> failure_;
  std::optional<std::string> trouble_;
  bool poked_ = false;
  bool leaving_ = false;
  bool over_ = false;  // nothing touches a caller's buffer any more, or nobody can say
  bool gone_ = false;  // the thread
  Clock::time_point over_since_;

  std::mutex closing_;
  bool closed_ = false;
  std::thread thread_;
};

}  // namespace ringkern
