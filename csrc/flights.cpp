#include "flights.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

std::string describe(Ticket ticket, const Flight& flight, Clock::duration age) {
  const auto count = flight.peers.size();
  std::string ranks = count == 0 ? "this rank" : count == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < count; ++i) ranks += concat(i == 0 ? "" : ", ", flight.peers[i]);
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.1f s", std::chrono::duration<double>(age).count());
  if (!flight.done) return concat("connecting with ", ranks, ", for ", seconds);
  if (flight.is_run) return concat("the run of a graph with ", ranks, ", open for ", seconds);
  return concat("exchange ", ticket, " (", flight.bytes_out, " bytes to and ", flight.bytes_in,
                " bytes from ", ranks, "), open for ", seconds);
}

}  // namespace

void Flight::describe(int rank, const std::vector<Send>& sends, const std::vector<Recv>& recvs) {
  std::set<int> others;
  for (const Send& send : sends) {
    bytes_out += send.nbytes;
    others.insert(send.peer);
  }
  for (const Recv& recv : recvs) {
    bytes_in += recv.nbytes;
    others.insert(recv.peer);
  }
  others.erase(rank);
  peers.assign(others.begin(), others.end());
}

// ---- posting

std::unique_ptr<Event> Flights::take_event() {
  if (events_.empty()) return std::make_unique<Event>(device_);
  auto event = std::move(events_.back());
  events_.pop_back();
  return event;
}

Flight Flights::prepare() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Flight flight;
  flight.posted = Clock::now();
  flight.ready = take_event();
  flight.done = take_event();
  return flight;
}

Ticket Flights::open(Flight flight) {
  const std::lock_guard<std::mutex> lock(mutex_);
  flights_.emplace_hint(flights_.end(), ++last_, std::move(flight));
  return last_;
}

Ticket Flights::open_done() {
  const auto now = nanoseconds(Clock::now());
  const std::lock_guard<std::mutex> lock(mutex_);
  done_.emplace(++last_, Times{now, now});
  return last_;
}

void Flights::launch(Ticket ticket, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = flights_.find(ticket);
  if (found == flights_.end()) return;  // the ring has ended since, and clear() was called
  Flight& flight = found->second;
  flight.done->record(stream);
  flight.launched = true;
  flight.waited = flight.is_run;
}

void Flights::capture(Ticket ticket, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto node = flights_.extract(ticket);
  node.mapped().done->record(stream);
  captured_.emplace(ticket, std::move(node.mapped()));
}

void Flights::end_captures() {
  const std::lock_guard<std::mutex> lock(mutex_);
  captured_.clear();
}

void Flights::drop(Ticket ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  flights_.erase(ticket);
}

// ---- becoming done

void Flights::reap() {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!flights_.empty()) {
    const auto oldest = flights_.begin();
    Flight& flight = oldest->second;
    if (!flight.launched || !flight.done->done()) return;
    if (!flight.waited) {
      done_.emplace(oldest->first, Times{nanoseconds(flight.posted), nanoseconds(Clock::now())});
    }
    events_.push_back(std::move(flight.ready));
    events_.push_back(std::move(flight.done));
    flights_.erase(oldest);
  }
}

std::optional<Times> Flights::wait(Ticket ticket, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (cleared_) return std::nullopt;
  if (const auto found = done_.find(ticket); found != done_.end()) {
    const Times times = found->second;
    done_.erase(found);
    return times;
  }
  if (const auto found = flights_.find(ticket); found != flights_.end()) {
    Flight& flight = found->second;
    if (flight.launched && !flight.waited) {
      // The driver would end the capture.
      if (device_.captures(stream)) {
        throw UnsupportedError(
            concat("wait() while a CUDA graph is captured: want a ticket of the ",
                   "same capture, got ", ticket, " from outside. Wait for it before."));
      }
      flight.done->hold(stream);
      flight.waited = true;
      return Times{nanoseconds(flight.posted), 0};
    }
  }
  if (const auto found = captured_.find(ticket); found != captured_.end()) {
    const Times times{nanoseconds(found->second.posted), 0};
    found->second.done->hold(stream);
    captured_.erase(found);
    return times;
  }
  throw ArgumentError(
      concat("ticket: want one that exchange() gave and nobody waited for, got ", ticket, "."));
}

std::size_t Flights::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return flights_.size();
}

bool Flights::landed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [ticket, flight] : flights_) {
    if (flight.launched && !flight.done->done()) return false;
  }
  return true;
}

bool Flights::awaited() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [ticket, flight] : flights_) {
    if (flight.waited) return true;
  }
  return false;
}

Ticket Flights::settled() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Ticket last = last_;
  // What a graph's kernels read may be given away when the stream that captures has waited for
  // them.
  if (!captured_.empty()) last = captured_.begin()->first - 1;
  if (!flights_.empty()) last = std::min(last, flights_.begin()->first - 1);
  return last;
}

std::optional<Flights::Oldest> Flights::oldest() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (flights_.empty()) return std::nullopt;
  auto& [ticket, flight] = *flights_.begin();
  const auto now = Clock::now();
  if (!flight.started) {
    if (flight.ready && !flight.captured && !flight.ready->done()) return std::nullopt;
    flight.started = now;
  }
  const auto age = now - *flight.started;
  return Oldest{ticket, age, flight.peers, describe(ticket, flight, age)};
}

void Flights::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cleared_ = true;
  flights_.clear();
  captured_.clear();
  done_.clear();
  events_.clear();
}

}  // namespace ringkern
