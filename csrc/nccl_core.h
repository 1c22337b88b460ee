// One rank's running ring over NCCL: the communicator, its stream, the thread that watches both,
// and the first failure.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cuda.h"
#include "error.h"
#include "flights.h"
#include "loop.h"
#include "nccl_comm.h"
#include "tally.h"
#include "transport.h"

namespace ringkern {

// Every function may be called from any thread. Lock order: closing_, calls_, inside_, mutex_ or
// the flights' own.
//
// The watching thread ends the ring, and a second one, which asks the driver for nothing before,
// aborts the communicator for it. The driver may keep the first waiting for a kernel that itself
// waits for a peer, as when a caller loads a module meanwhile: the second then ends the ring in its
// place. And ncclCommAbort, when it has ended the kernels, waits for the end of all graphs with
// exchanges, which are the caller's. Both threads share the ownership: when NCCL does not return to
// one, it is left behind with all that it uses.
class NcclCore : public std::enable_shared_from_this<NcclCore> {
 public:
  NcclCore(std::unique_ptr<Transport> control, std::shared_ptr<const NcclLibrary> nccl,
           std::shared_ptr<const Driver> driver, int device, int rank, int world_size,
           std::chrono::milliseconds timeout, std::chrono::milliseconds control_timeout);
  ~NcclCore();

  // Meets the other ranks. To be called once, before anything else.
  void connect(const NcclConfig& config, const std::function<void()>& on_idle);
  // The entries have been checked.
  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream stream);
  Ticket begin_run(Stream stream);
  void end_run(Ticket ticket, Stream stream);
  bool poll(std::chrono::milliseconds slice);
  Times wait(Ticket ticket, Stream stream);
  Ticket settled();
  void abort(const std::string& reason);
  void close();
  Stats stats() const { return tally_.read(*control_); }
  Transport& control() { return *control_; }

 private:
  // kClosing: calls are refused, and streams that wait get their data. kEnding: the communicator is
  // being ended. kOver: nothing touches a caller's buffer any more, or nobody can say.
  enum class State { kOpen, kClosing, kEnding, kOver };

  // What this rank met that ends the ring. `remote`: another rank may have more to say about it.
  struct Trouble {
    std::string text;
    bool remote;
  };

  void share_id(const std::function<void()>& on_idle);
  void finish_on_control(Ticket ticket, const std::function<void()>& on_idle);
  void meet(const std::function<void()>& on_idle);
  std::vector<int> others() const;

  Ticket post(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream stream,
              bool captured);
  bool captures(Stream stream) const;
  void make_room();
  void settle(const std::function<void()>& on_idle);

  void trouble(const std::exception& error);
  [[noreturn]] void raise();
  bool over() const;  // needs mutex_
  void await_end();

  // The watching threads', in nccl_watch.cpp.
  class Asking;
  void start();
  void watch() noexcept;
  void look();
  void check_control();
  void check_trouble();
  void check_deadline();
  void check_closing();
  [[noreturn]] void report(const Trouble& trouble, Kind kind = Kind::kTransport);
  void end(Failure failure, bool in_peace) noexcept;
  bool begin_end(Failure failure);
  void finish_end(bool in_peace) noexcept;
  bool end_communicator(bool in_peace);
  bool quiet();
  bool flush();
  void await_others(Clock::time_point end);
  void guard() noexcept;
  void check_driver(Clock::duration silent);
  void abort_communicator() noexcept;

  // How long NCCL may take to end before nobody waits for it any more.
  Clock::duration grace() const;
  std::string me() const { return concat("rank ", rank_, " of ", world_size_); }

  const int rank_;
  const int world_size_;
  const std::chrono::milliseconds timeout_, control_timeout_;
  NcclId id_{};  // outlives control_, which may still receive it when connecting is broken off
  const std::unique_ptr<Transport> control_;
  const Device device_;
  std::unique_ptr<OwnStream> stream_;
  Flights flights_;
  Tally tally_;

  std::mutex calls_;   // held while the communicator is called and the stream is given work
  std::mutex inside_;  // held while a thread is inside NCCL, but for the abort
  NcclComm comm_;
  std::atomic<bool> has_graphs_{false};  // exchanges were captured

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<State> state_{State::kOpen};  // written under mutex_
  std::optional<Failure> failure_;
  std::optional<Trouble> trouble_;
  Clock::time_point ending_since_;
  bool poked_ = false;
  enum class Abort { kNone, kWanted, kBegun } abort_ = Abort::kNone;
  bool gone_ = false;                              // the watching thread
  bool guard_gone_ = false;                        // the second one
  std::optional<Clock::time_point> asking_since_;  // it waits for the driver

  std::optional<Clock::time_point> asked_;  // the watching thread's own

  std::mutex closing_;
  bool closed_ = false;
  std::thread thread_, guard_;
};

}  // namespace ringkern
