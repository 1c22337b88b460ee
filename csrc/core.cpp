#include "core.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

constexpr std::chrono::milliseconds kHandshakeTimeout{5000};

// What exchange() itself moves: enough for the latency of small messages, so little that it returns
// in microseconds. Large messages are left to the loop, which copies while the caller computes.
constexpr std::size_t kCallerBytes = std::size_t{64} << 10;

// How long a waiting caller helps before it looks up.
constexpr std::chrono::milliseconds kSlice{1000};

// How long it looks without sleeping, where every rank of this host has a core: about as long as
// waking up takes. With fewer cores than ranks it would keep others from sending.
constexpr std::chrono::microseconds kSpin{20};

// How long close() waits for its goodbyes to leave, when the sockets are full.
constexpr std::chrono::milliseconds kGoodbye{1000};

}  // namespace

Core::Core(Listener listener, int rank, std::vector<Address> addresses, const Terms& terms,
           Bytes secret, std::chrono::milliseconds timeout)
    : rank_(rank),
      secret_(std::move(secret)),
      loop_(mutex_, [this](const std::exception& error) { fail(error); }),
      ring_{rank,
            terms,
            timeout,
            std::move(addresses),
            secret_,
            loop_,
            ledger_,
            {},
            [this](Kind kind, int origin, const std::string& reason, int told_by) {
              fail(kind, origin, reason, told_by);
            }} {
  const auto world_size = static_cast<std::size_t>(terms.world_size);
  ring_.stats.bytes_sent.resize(world_size);
  ring_.stats.bytes_received.resize(world_size);
  counts_.resize(2 * world_size);
  links_.resize(world_size);
  for (int peer = 0; peer < terms.world_size; ++peer) {
    if (peer != rank) links_[static_cast<std::size_t>(peer)] = std::make_unique<Link>(ring_, peer);
  }
  acceptor_ = std::make_unique<Acceptor>(
      loop_, std::move(listener), terms, rank, secret_, std::min(kHandshakeTimeout, timeout),
      [this](const Place& place) { return link(place.src).is_free(place.lane); },
      [this](const Place& place, Socket socket) {
        link(place.src).admit(place.lane, std::move(socket));
      });
  deadlines_ = std::make_unique<Deadlines>(ring_, links_, *acceptor_);
  if (ranks_here() <= std::thread::hardware_concurrency()) loop_.set_spin(kSpin);
  loop_.start();
}

Core::~Core() { close(); }

std::size_t Core::ranks_here() const {
  const Address& mine = ring_.addresses[static_cast<std::size_t>(rank_)];
  return static_cast<std::size_t>(
      std::count_if(ring_.addresses.begin(), ring_.addresses.end(),
                    [&](const Address& other) { return mine.same_host(other); }));
}

Ticket Core::connect() {
  const std::lock_guard<FairMutex> lock(mutex_);
  const int world_size = ring_.terms.world_size;
  std::vector<int> neighbours{(rank_ + 1) % world_size, (rank_ + world_size - 1) % world_size};
  if (world_size <= 2) neighbours.resize(static_cast<std::size_t>(world_size - 1));
  const Ticket ticket = ledger_.open(neighbours.size());
  for (const int peer : neighbours) link(peer).connect(ticket);
  deadlines_->arm();
  return ticket;
}

// ---- posting

Ticket Core::exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs) {
  const std::lock_guard<FairMutex> lock(mutex_);
  ledger_.raise_if_failed();
  try {
    return post(sends, recvs);
  } catch (const ArgumentError&) {
    throw;
  } catch (const std::exception& error) {
    fail(error);
  }
  ledger_.raise_if_failed();
  throw TransportError(rank_, "the ring has failed");
}

Ticket Core::post(const std::vector<Send>& sends, const std::vector<Recv>& recvs) {
  const auto world_size = links_.size();
  std::fill(counts_.begin(), counts_.end(), 0);
  for (const Send& send : sends) ++counts_[static_cast<std::size_t>(send.peer)];
  for (const Recv& recv : recvs) ++counts_[world_size + static_cast<std::size_t>(recv.peer)];
  const auto touched = [&](std::size_t peer) { return counts_[peer] + counts_[world_size + peer]; };
  for (std::size_t peer = 0; peer < world_size; ++peer) {
    if (touched(peer)) links_[peer]->check_post(counts_[peer], counts_[world_size + peer]);
  }
  const Ticket ticket = ledger_.open(sends.size() + recvs.size());
  std::size_t budget = kCallerBytes;
  for (const Recv& recv : recvs) link(recv.peer).post(recv, ticket);
  for (const Send& send : sends) link(send.peer).post(send, ticket);
  deadlines_->arm();
  for (std::size_t i = 0; i < world_size; ++i) {
    // Each rank begins with the next one, so that not all of them send to rank 0 first.
    const std::size_t peer = (static_cast<std::size_t>(rank_) + i) % world_size;
    if (touched(peer)) links_[peer]->advance(&budget);
  }
  return ticket;
}

bool Core::poll(Ticket ticket, std::chrono::milliseconds slice) {
  const auto done = [&] { return ledger_.is_over(ticket); };
  // A caller that has time and nothing else to do moves the bytes itself.
  if (slice.count() > 0 && !done() && loop_.help(done, slice)) return done();
  return ledger_.poll(ticket, slice);
}

Times Core::wait(Ticket ticket) {
  while (!poll(ticket, kSlice)) {
  }
  return ledger_.wait(ticket);
}

// ---- failing

void Core::fail(const std::exception& error) noexcept {
  const auto* known = dynamic_cast<const TransportError*>(&error);
  fail(kind_of(error), known ? known->origin : rank_, error.what(), rank_);
}

// Needs the mutex: once it is released, no thread touches a caller's buffer any more.
void Core::fail(Kind kind, int origin, const std::string& reason, int told_by) noexcept {
  try {
    if (ledger_.failed()) return;
    for (const auto& link : links_) {
      if (link) link->stop();
    }
    const std::string by = told_by != rank_  ? concat(" (told by rank ", told_by, ")")
                           : origin != rank_ ? concat(" (seen by rank ", rank_, ")")
                                             : "";
    ledger_.fail({kind, origin, concat("rank ", origin, " failed", by, ": ", reason)});
    loop_.nudge();
    Header header;
    header.type = Type::kAbort;
    header.seq = static_cast<std::uint64_t>(origin);
    header.offset = static_cast<std::uint64_t>(kind);
    const std::string text = clean_text(reason);
    for (const auto& link : links_) {
      if (link) link->tell(header, text);
    }
  } catch (...) {
    ledger_.fail({kind, origin, ""});  // out of memory: without words, but failed
  }
}

void Core::abort(const std::string& reason) {
  const std::lock_guard<FairMutex> lock(mutex_);
  fail(Kind::kTransport, rank_, concat(ring_.me(), " was aborted: ", clean_text(reason)), rank_);
}

// ---- leaving

void Core::close() {
  const std::lock_guard<std::mutex> closing(closing_);
  if (closed_) return;
  closed_ = true;
  say_goodbye();
  loop_.stop();
  const std::lock_guard<FairMutex> lock(mutex_);
  ring_.stats.rejected_connections = acceptor_->rejected();
  for (const auto& link : links_) {
    if (link) link->drain();
  }
  links_.clear();
  deadlines_.reset();
  acceptor_.reset();
}

void Core::say_goodbye() {
  const auto end = Clock::now() + kGoodbye;
  std::unique_lock<FairMutex> lock(mutex_);
  if (!ledger_.failed()) {
    for (const auto& link : links_) {
      if (link) link->say_bye();
    }
    for (const auto& link : links_) {
      if (link) link->stop();
    }
    ledger_.fail({Kind::kTransport, rank_, concat(ring_.me(), " has closed this ring")});
    loop_.nudge();
  }
  const auto flushed = [&] {
    return std::all_of(links_.begin(), links_.end(),
                       [](const auto& link) { return !link || link->flush(); });
  };
  while (!flushed() && Clock::now() < end) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    lock.lock();
  }
}

Stats Core::stats() {
  const std::lock_guard<FairMutex> lock(mutex_);
  Stats stats = ring_.stats;
  if (acceptor_) stats.rejected_connections = acceptor_->rejected();
  return stats;
}

}  // namespace ringkern
