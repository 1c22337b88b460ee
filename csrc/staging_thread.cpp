// The thread that moves pieces between the GPU and the wire. Neither calls it back: it asks both,
// again and again, and sleeps when no exchange is open.

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "staging_core.h"

namespace ringkern {
namespace {

// For how long the thread asks without sleeping after something has moved.
constexpr std::chrono::microseconds kSpin{50};

// Then it sleeps for a part of the time for which nothing has moved, so that it is late by no more
// than that part.
constexpr int kPart = 32;
constexpr std::chrono::microseconds kLeastPause{20}, kMostPause{200};
constexpr unsigned long kTimerSlackNs = 1000;  // of 50 us, which would be most of a pause

// How often the wire is asked whether it has failed, as no piece on it may be there to say so; and
// how often while no exchange is open.
constexpr std::chrono::milliseconds kCheck{5}, kIdleCheck{50};

constexpr std::chrono::microseconds kDrainPause{100};

}  // namespace

void StagingCore::start() {
  moved_ = checked_ = Clock::now();
  // Signals are for the program's own threads.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([self = shared_from_this()] { self->run(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "ringkern-stage");
}

void StagingCore::run() noexcept {
  ::prctl(PR_SET_TIMERSLACK, kTimerSlackNs, 0, 0, 0);
  try {
    const Device::Use use(device_);
    work();
    wire_->close();
    end({Kind::kTransport, rank_, concat(me(), " has closed this ring")});
  } catch (const TransportError& error) {
    end({kind_of(error), error.origin, error.what() + whereabouts()});
  } catch (const std::exception& error) {
    Failure failure = blame_self(error.what());
    failure.text += whereabouts();
    end(std::move(failure));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  gone_ = true;
  changed_.notify_all();
}

void StagingCore::work() {
  while (take_posted()) {
    if (advance()) {
      moved_ = Clock::now();
    } else {
      rest();
    }
  }
}

// False when the ring is closed. Sleeps while there is nothing to do.
bool StagingCore::take_posted() {
  std::vector<StagedExchange> posted;
  const bool has_work = this->has_work();
  bool poked;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!has_work) wake_.wait_for(lock, kIdleCheck, [this] { return poked_; });
    if (trouble_) throw std::runtime_error(*trouble_);
    if (leaving_) return false;
    posted.swap(posted_);
    poked = std::exchange(poked_, false);
  }
  if (poked || !has_work) check_wire();
  for (StagedExchange& exchange : posted) admit(std::move(exchange));
  return true;
}

// Copies to the GPU need nobody's help, but for a timeline, which says when they ended.
bool StagingCore::has_work() const {
  const auto busy = [](const auto& lane) { return lane && !lane->idle(); };
  return !gear_->exchanges.empty() ||
         (legs_.wanted() && std::any_of(ins_.begin(), ins_.end(), busy));
}

template <typename AnyLane>
SlotLane& StagingCore::lane(Lanes& lanes, int peer) {
  auto& slot = lanes[static_cast<std::size_t>(peer)];
  if (!slot) slot = std::make_unique<AnyLane>(*gear_, peer);
  return *slot;
}

void StagingCore::admit(StagedExchange exchange) {
  const Ticket ticket = exchange.ticket;
  StagedExchange& it = gear_->exchanges.emplace(ticket, std::move(exchange)).first->second;
  for (const Send& send : it.sends) {
    if (send.peer == rank_) continue;
    lane<OutLane>(outs_, send.peer).post(it, const_cast<void*>(send.data), send.nbytes);
  }
  for (const Recv& recv : it.recvs) {
    if (recv.peer == rank_) continue;
    lane<InLane>(ins_, recv.peer).post(it, recv.data, recv.nbytes);
  }
  moved_ = Clock::now();
}

bool StagingCore::advance() {
  bool moved = false;
  const auto ranks = outs_.size();
  for (std::size_t i = 1; i <= ranks; ++i) {
    // Each rank begins with the next one, so that not all of them send to rank 0 first.
    const std::size_t peer = (static_cast<std::size_t>(rank_) + i) % ranks;
    if (ins_[peer] && ins_[peer]->advance()) moved = true;
    if (outs_[peer] && outs_[peer]->advance()) moved = true;
  }
  if (moved) publish();
  return moved;
}

// Tells callers what has become of their exchanges.
void StagingCore::publish() {
  auto& exchanges = gear_->exchanges;
  for (auto it = exchanges.begin(); it != exchanges.end();) {
    StagedExchange& exchange = it->second;
    if (exchange.unposted == 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (unposted_.erase(it->first) > 0) changed_.notify_all();
    }
    if (exchange.unfinished > 0) {
      ++it;
      continue;
    }
    launch(exchange);
    it = exchanges.erase(it);
  }
}

void StagingCore::launch(StagedExchange& exchange) {
  const Stream stream = gear_->to_device.handle();
  if (exchange.own) exchange.own->hold(stream);
  flights_.launch(exchange.ticket, stream);
  const auto now = nanoseconds(Clock::now());
  const std::lock_guard<std::mutex> lock(mutex_);
  done_ns_.emplace(exchange.ticket, now);
  open_.erase(exchange.ticket);
  tally_.add(exchange.sends, exchange.recvs);
  changed_.notify_all();
}

void StagingCore::rest() {
  const auto now = Clock::now();
  const auto waited = now - moved_;
  if (waited < kSpin) return std::this_thread::yield();
  if (now - checked_ >= kCheck) {
    check_wire();
    flights_.oldest();  // so that an error knows since when it has been open
    checked_ = now;
  }
  const auto pause = std::clamp<Clock::duration>(waited / kPart, kLeastPause, kMostPause);
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait_for(lock, pause, [this] { return poked_; });
}

// ---- ending

// Tells the other ranks; another rank may have been first.
Failure StagingCore::blame_self(const std::string& text) {
  wire_->abort(text);
  try {
    check_wire();
  } catch (const TransportError& error) {
    return {kind_of(error), error.origin, error.what()};
  }
  return {Kind::kTransport, rank_, concat("rank ", rank_, " failed: ", text)};
}

// What this rank was at, for the error.
std::string StagingCore::whereabouts() {
  try {
    const Device::Use use(device_);
    flights_.reap();
    if (const auto oldest = flights_.oldest()) {
      return concat(". On rank ", rank_, " the GPU was at ", oldest->text,
                    ", in pieces of at most ", options_.slot_bytes, " bytes");
    }
  } catch (const CudaError&) {
  }
  return "";
}

// The wire has ended: it touches no slot any more.
void StagingCore::end(Failure failure) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_ = std::move(failure);
    changed_.notify_all();
  }
  const auto end = Clock::now() + options_.grace;
  bool drained = false;
  try {
    const Device::Use use(device_);
    while (!(drained = idle()) && Clock::now() < end) std::this_thread::sleep_for(kDrainPause);
    if (drained) flights_.clear();
  } catch (const CudaError&) {
    // The context is gone, and with it all of its work.
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
    over_since_ = Clock::now();
    changed_.notify_all();
  }
  if (!drained) return;
  try {
    const Device::Use use(device_);
    release();
  } catch (const CudaError&) {
  }
}

bool StagingCore::idle() const {
  return gear_->to_host.idle() && gear_->to_device.idle() && own_->idle();
}

void StagingCore::release() {
  outs_.clear();
  ins_.clear();
  gear_.reset();
  own_.reset();
}

}  // namespace ringkern
