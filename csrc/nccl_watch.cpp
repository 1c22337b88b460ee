// The thread that watches a ring over NCCL, which itself says nothing when a peer is gone: a kernel
// waits on the GPU, for ever. What ends the ring is seen here, told to the other ranks over the
// control ring, and only then is the communicator ended: NCCL wants all ranks to do it.

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "nccl_core.h"

namespace ringkern {
namespace {

// How often the thread looks, and how often when a caller waits for it to close.
constexpr std::chrono::milliseconds kTick{20};
constexpr std::chrono::milliseconds kClosingTick{1};

// NCCL notices that a peer is gone about when the control ring does. The control ring knows who; it
// gets this long to say it.
constexpr std::chrono::milliseconds kNews{1000};

constexpr std::chrono::milliseconds kGrace{5000};

// How often the second thread looks after the first.
constexpr std::chrono::milliseconds kGuard{100};

void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

Failure failure_from(const TransportError& error) {
  return {kind_of(error), error.origin, error.what()};
}

}  // namespace

// While the watching thread is where the driver can keep it.
class NcclCore::Asking {
 public:
  explicit Asking(NcclCore& core) : core_(core) { set(Clock::now()); }
  ~Asking() { set(std::nullopt); }
  Asking(const Asking&) = delete;
  Asking& operator=(const Asking&) = delete;

 private:
  void set(std::optional<Clock::time_point> since) {
    const std::lock_guard<std::mutex> lock(core_.mutex_);
    core_.asking_since_ = since;
  }

  NcclCore& core_;
};

Clock::duration NcclCore::grace() const { return std::min<Clock::duration>(timeout_, kGrace); }

void NcclCore::start() {
  // Signals are for the program's own threads.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([self = shared_from_this()] { self->watch(); });
  guard_ = std::thread([self = shared_from_this()] { self->guard(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "ringkern-nccl");
  ::pthread_setname_np(guard_.native_handle(), "ringkern-guard");
}

void NcclCore::watch() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  while (state_ != State::kOver) {
    const auto tick = state_ == State::kClosing ? kClosingTick : kTick;
    changed_.wait_for(lock, tick, [this] { return poked_; });
    poked_ = false;
    lock.unlock();
    try {
      if (state_ == State::kEnding) {  // the other thread has begun it
        finish_end(false);
      } else {
        look();
      }
    } catch (const TransportError& error) {
      end(failure_from(error), false);
    } catch (const std::exception& error) {
      end({Kind::kTransport, rank_, concat("rank ", rank_, " failed: ", error.what())}, false);
    }
    lock.lock();
  }
  gone_ = true;
  changed_.notify_all();
}

void NcclCore::look() {
  check_control();
  check_trouble();
  try {
    const Asking asking(*this);
    const Device::Use use(device_);
    flights_.reap();
    // Who holds the communicator asks it too.
    if (const std::unique_lock<std::mutex> calls(calls_, std::try_to_lock); calls) {
      const std::lock_guard<std::mutex> inside(inside_);
      // The second thread may have ended the ring, and be in the communicator.
      if (state_ != State::kEnding) comm_.settled();
    }
    check_deadline();
  } catch (const NcclError& error) {
    trouble(error);
    check_trouble();
  } catch (const CudaError& error) {
    trouble(error);
    check_trouble();
  }
  if (state_ == State::kClosing) check_closing();
}

// ---- what ends the ring

void NcclCore::check_control() { control_->wait(control_->exchange({}, {}, 0), 0); }

void NcclCore::check_trouble() {
  std::optional<Trouble> trouble;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    trouble = trouble_;
  }
  if (trouble) report(*trouble);
}

void NcclCore::check_deadline() {
  const auto now = Clock::now();
  const auto oldest = flights_.oldest();
  if (asked_) {
    if (now < *asked_ + control_timeout_ + kNews) return;
    report({concat("NCCL: ", oldest ? oldest->text : "a late exchange",
                   ", and the control ring does not know why"),
            false},
           Kind::kTimeout);
  }
  if (!oldest || oldest->age < timeout_) return;
  if (oldest->peers.empty()) report({concat("NCCL: ", oldest->text), false}, Kind::kTimeout);
  // A message that nobody sends: whoever waits asks, so the rank that nobody can answer for is the
  // one that does not. The control ring's own deadlines find it, and tell all ranks.
  std::vector<Recv> recvs;
  for (const int peer : oldest->peers) recvs.push_back({peer, nullptr, 0});
  asked_ = now;
  control_->exchange({}, recvs, 0);
}

// Tells the other ranks, and raises what all of them raise: another rank may have been first.
void NcclCore::report(const Trouble& trouble, Kind kind) {
  const auto end = Clock::now() + kNews;
  while (trouble.remote && Clock::now() < end) {
    check_control();
    pause();
  }
  control_->abort(trouble.text);
  Failure failure{kind, rank_, concat("rank ", rank_, " failed: ", trouble.text)};
  try {
    check_control();
  } catch (const TransportError& error) {
    failure = failure_from(error);
    // An abort brings the origin and the words.
    if (failure.origin == rank_) failure.kind = kind;
  }
  failure.raise();
}

// ---- ending

void NcclCore::check_closing() {
  if (flights_.awaited()) return;
  Failure closed{Kind::kTransport, rank_, concat(me(), " has closed this ring")};
  const std::size_t open = flights_.size();
  if (open > 0) control_->abort(concat("it closed the ring with exchanges open: ", open));
  end(std::move(closed), open == 0);
}

void NcclCore::end(Failure failure, bool in_peace) noexcept {
  try {
    const Asking asking(*this);
    const Device::Use use(device_);
    const auto oldest = flights_.oldest();
    if (oldest && failure.origin != rank_)
      failure.text += concat(". On rank ", rank_, " NCCL was at ", oldest->text);
  } catch (const CudaError&) {
  }
  finish_end(begin_end(std::move(failure)) && in_peace);
}

// Callers raise this failure from now on: false where they have another one already.
bool NcclCore::begin_end(Failure failure) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) return false;
  failure_ = std::move(failure);
  state_ = State::kEnding;
  ending_since_ = Clock::now();
  changed_.notify_all();
  return true;
}

void NcclCore::finish_end(bool in_peace) noexcept {
  bool idle = false;
  try {
    const Device::Use use(device_);
    idle = end_communicator(in_peace);
    if (idle) flights_.clear();
  } catch (const CudaError&) {
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  state_ = State::kOver;
  changed_.notify_all();
}

// Whether nothing runs on the GPU any more. When a caller does not come back from NCCL, the
// communicator is left as it is: to free what that call uses would be worse.
bool NcclCore::end_communicator(bool in_peace) {
  auto end = Clock::now() + grace();
  std::unique_lock<std::mutex> calls(calls_, std::defer_lock);
  while (!calls.try_lock()) {
    if (Clock::now() > end) return false;
    pause();
  }
  const bool flushed = in_peace && flush();
  if (!flushed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (abort_ == Abort::kNone) abort_ = Abort::kWanted;
    changed_.notify_all();
  }
  const auto begun = [this] {
    const std::lock_guard<std::mutex> lock(mutex_);
    return abort_ == Abort::kBegun;
  };
  end = Clock::now() + grace();
  while (!(flushed || begun()) || !quiet()) {
    if (Clock::now() > end) return false;
    pause();
  }
  return true;
}

// Whether the GPU has done what it was given, in runs of graphs too.
bool NcclCore::quiet() { return stream_->idle() && flights_.landed(); }

// Lets what this rank sent reach the others, and ends the communicator: false where it has not.
bool NcclCore::flush() {
  const auto end = Clock::now() + grace();
  const std::lock_guard<std::mutex> inside(inside_);
  try {
    if (has_graphs_) {
      // NCCL's own end waits for the end of all graphs, which are the caller's. When all ranks are
      // here, nothing is under way, and aborting loses nothing.
      await_others(end);
      return false;
    }
    comm_.finalize();
    while (!comm_.settled()) {
      if (Clock::now() > end) return false;
      pause();
    }
    comm_.destroy();
    return true;
  } catch (const NcclError&) {
    return false;
  }
}

// Returns when all other ranks have come here too, or one is gone, or it is too late.
void NcclCore::await_others(Clock::time_point end) {
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  for (const int peer : others()) {
    sends.push_back({peer, nullptr, 0});
    recvs.push_back({peer, nullptr, 0});
  }
  try {
    const Ticket ticket = control_->exchange(sends, recvs, 0);
    while (!control_->poll(ticket, kClosingTick) && Clock::now() < end) {
    }
  } catch (const TransportError&) {
  }
}

// ---- the second thread

void NcclCore::guard() noexcept {
  std::optional<Device::Use> use;  // NCCL wants it: made while the driver answers
  try {
    use.emplace(device_);
  } catch (const CudaError&) {
    // Connecting meets the same, and says so.
  }
  std::unique_lock<std::mutex> lock(mutex_);
  const auto wanted = [this] { return abort_ == Abort::kWanted; };
  while (!gone_ && !wanted()) {
    changed_.wait_for(lock, kGuard, [&] { return gone_ || wanted(); });
    if (failure_ || !asking_since_) continue;
    const auto silent = Clock::now() - *asking_since_;
    if (silent < kNews) continue;
    lock.unlock();
    std::optional<Failure> failure;
    try {
      check_driver(silent);
    } catch (const TransportError& error) {
      failure = failure_from(error);
    } catch (const std::exception&) {
      // Nothing that this thread could mend: the other one sees it too.
    }
    const bool first = failure && begin_end(std::move(*failure));
    lock.lock();
    if (first) abort_ = Abort::kWanted;
  }
  const bool aborts = wanted();
  lock.unlock();
  if (aborts) abort_communicator();
  use.reset();
  lock.lock();
  guard_gone_ = true;
  changed_.notify_all();
}

// Its kernels end, and with them what keeps the driver from answering. Not where a caller is inside
// NCCL: to free what that call uses would be worse.
void NcclCore::abort_communicator() noexcept {
  const auto end = Clock::now() + grace();
  // Whoever comes after sees that the ring has ended, and stays out.
  for (std::unique_lock<std::mutex> inside(inside_, std::defer_lock); !inside.try_lock(); pause()) {
    if (Clock::now() > end) return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    abort_ = Abort::kBegun;
    changed_.notify_all();
  }
  try {
    comm_.abort();
  } catch (const NcclError&) {
    // It is gone all the same; what it left behind shows on the stream.
  }
}

// Raises where another rank has ended the ring, or the driver has been silent for too long.
void NcclCore::check_driver(Clock::duration silent) {
  check_control();
  if (silent < timeout_) return;
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(silent).count();
  report({concat("CUDA: the driver has not answered for ", seconds, " s"), false}, Kind::kTimeout);
}

}  // namespace ringkern
