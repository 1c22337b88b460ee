#include "ledger.h"

#include <utility>

namespace ringkern {

Ticket Ledger::open(std::size_t messages) {
  const auto now = Clock::now();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) failure_->raise();
  const Ticket ticket = next_++;
  if (messages == 0) {
    done_.emplace(ticket, Times{nanoseconds(now), nanoseconds(now)});
  } else {
    open_.emplace_hint(open_.end(), ticket, Open{now, messages});
  }
  return ticket;
}

void Ledger::finish_one(Ticket ticket) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto found = open_.find(ticket);
  if (found == open_.end() || --found->second.messages > 0) return;
  const Times times{nanoseconds(found->second.posted), nanoseconds(Clock::now())};
  open_.erase(found);
  done_.emplace(ticket, times);
  lock.unlock();  // or the waiter wakes only to wait for the mutex
  changed_.notify_all();
}

bool Ledger::fail(Failure failure) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) return false;
  failure_ = std::move(failure);
  open_.clear();
  changed_.notify_all();
  return true;
}

bool Ledger::failed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failure_.has_value();
}

void Ledger::raise_if_failed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) failure_->raise();
}

std::optional<Ledger::Entry> Ledger::oldest() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (open_.empty()) return std::nullopt;
  return Entry{open_.begin()->first, open_.begin()->second.posted};
}

bool Ledger::over(Ticket ticket) const { return open_.count(ticket) == 0; }

bool Ledger::is_over(Ticket ticket) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return over(ticket);
}

bool Ledger::poll(Ticket ticket, std::chrono::milliseconds slice) const {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, slice, [&] { return over(ticket); });
}

Times Ledger::wait(Ticket ticket) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return over(ticket); });
  const auto found = done_.find(ticket);
  if (found != done_.end()) {
    const Times times = found->second;
    done_.erase(found);
    return times;
  }
  if (failure_) failure_->raise();
  throw ArgumentError(
      concat("ticket: want one that exchange() gave and nobody waited for, got ", ticket, "."));
}

}  // namespace ringkern
