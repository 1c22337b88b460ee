// A whole ring for the stub driver's memory over TCP in one process, a thread for each rank, with a
// wire that writes down what passes it and can hold it back.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "gpu_ranks.h"
#include "staging.h"

namespace ringkern {

using Buffer = std::vector<std::uint8_t>;

class WatchedWire : public Transport {
 public:
  explicit WatchedWire(std::unique_ptr<Transport> wire) : wire_(std::move(wire)) {}

  // So many more messages are done, and then none; -1: all.
  std::atomic<int> let_out{-1}, let_in{-1};
  // How often somebody has asked whether a message is done.
  std::atomic<int> questions{0};

  // Sizes of what was sent so far.
  std::vector<std::size_t> sent() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sent_;
  }
  std::size_t posted() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return posted_;
  }

  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                  Stream stream) override {
    if (sends.size() + recvs.size() != 1) return wire_->exchange(sends, recvs, stream);
    const bool out = !sends.empty();
    const Message message{out, out ? sends[0].data : recvs[0].data,
                          out ? sends[0].nbytes : recvs[0].nbytes};
    // What will come overwrites it; nobody may see it before.
    if (!out && message.nbytes > 0) std::memset(recvs[0].data, 0x3c, message.nbytes);
    write(out ? "send" : "recv", message);
    const Ticket ticket = wire_->exchange(sends, recvs, stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    messages_.emplace(ticket, message);
    ++posted_;
    if (out) sent_.push_back(message.nbytes);
    return ticket;
  }

  bool poll(Ticket ticket, std::chrono::milliseconds slice) override {
    ++questions;
    if (!wire_->poll(ticket, slice)) return false;
    const auto* const message = find(ticket);
    return message == nullptr || (message->out ? let_out : let_in) != 0;
  }

  Times wait(Ticket ticket, Stream stream) override {
    const Times times = wire_->wait(ticket, stream);
    if (const auto* const message = find(ticket)) {
      auto& let = message->out ? let_out : let_in;
      if (let > 0) --let;
      write(message->out ? "sent" : "came", *message);
    }
    return times;
  }

  void abort(const std::string& reason) override { wire_->abort(reason); }
  void close() override { wire_->close(); }
  Stats stats() const override { return wire_->stats(); }

 private:
  struct Message {
    bool out;
    const void* host;
    std::size_t nbytes;
  };

  static void write(const char* what, const Message& message) {
    if (message.nbytes > 0) stub::write({what, message.host, nullptr, message.nbytes});
  }
  const Message* find(Ticket ticket) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = messages_.find(ticket);
    return found == messages_.end() ? nullptr : &found->second;
  }

  const std::unique_ptr<Transport> wire_;
  mutable std::mutex mutex_;
  std::map<Ticket, Message> messages_;
  std::vector<std::size_t> sent_;
  std::size_t posted_ = 0;
};

// Every slot goes round, and no step begins before the one before it has ended.
inline void check_slots() {
  const std::map<std::string, std::vector<std::string>> may_follow{
      {"DtoH put", {"alloc", "sent"}},  {"DtoH done", {"DtoH put"}},
      {"send", {"DtoH done"}},          {"sent", {"send"}},
      {"recv", {"alloc", "HtoD done"}}, {"came", {"recv"}},
      {"HtoD put", {"came"}},           {"HtoD done", {"HtoD put"}}};
  std::map<const void*, std::string> state;
  for (const auto& entry : stub::journal()) {
    if (entry.what == "alloc") state[entry.host] = entry.what;
    if (entry.what == "free") state.erase(entry.host);
    const auto slot = state.find(entry.host);
    const auto rule = may_follow.find(entry.what);
    if (slot == state.end() || rule == may_follow.end()) continue;
    const auto& before = rule->second;
    if (std::find(before.begin(), before.end(), slot->second) == before.end()) {
      FAIL_CHECK(entry.what << " after " << slot->second);
    }
    slot->second = entry.what;
  }
}

// How often it is in the journal, with memory of the GPU that is in the buffer.
inline int times(const std::string& what, const Buffer& buffer) {
  const auto journal = stub::journal();
  return static_cast<int>(std::count_if(journal.begin(), journal.end(), [&](const auto& entry) {
    const auto* const device = static_cast<const std::uint8_t*>(entry.device);
    return entry.what == what && device >= buffer.data() && device < buffer.data() + buffer.size();
  }));
}

struct CleanStaged : CleanStubs {
  ~CleanStaged() {
    check_slots();
    CHECK(stub::pinned_alive() == 0);
  }
};

// A caller's stream. What is still on it goes with it, also when a test fails.
struct CallerStream {
  const Stream handle = stub::make_stream();
  ~CallerStream() { stub::destroy_stream(handle); }
};

struct StagedRank {
  const int rank;
  WatchedWire& wire;
  DeviceTransport& ring;
  const Stream stream;
  const std::function<void()> meet;  // returns when all ranks have called it as often
};

class Meeting {
 public:
  explicit Meeting(int ranks) : ranks_(ranks) {}
  void meet() {
    const int mine = ++came_, all = (mine + ranks_ - 1) / ranks_ * ranks_;
    until([&] { return came_ >= all; });
  }

 private:
  const int ranks_;
  std::atomic<int> came_{0};
};

inline StagingOptions staging_options(std::size_t slot_bytes = 64, int slots = 2,
                                      int grace_ms = 20000) {
  StagingOptions options;
  options.slot_bytes = slot_bytes;
  options.slots = slots;
  options.grace = std::chrono::milliseconds(grace_ms);
  return options;
}

inline std::unique_ptr<DeviceTransport> join_staged(Ports& ports, int rank,
                                                    const StagingOptions& options,
                                                    int timeout_ms = 20000,
                                                    WatchedWire** watched = nullptr) {
  auto wire = std::make_unique<WatchedWire>(ports.join(rank, test_options(1, false, timeout_ms)));
  if (watched) *watched = wire.get();
  return make_staged(std::move(wire), rank, static_cast<int>(ports.addresses.size()),
                     Driver::open(), 0, options);
}

// Forms a ring, runs the body on all ranks, and lets them leave together.
inline void run_staged(int world_size, const StagingOptions& options,
                       const std::function<void(StagedRank)>& body) {
  const CleanStaged clean;
  Ports ports(world_size);
  Meeting meeting(world_size);
  in_parallel(static_cast<std::size_t>(world_size), [&](int rank) {
    WatchedWire* wire = nullptr;
    const auto ring = join_staged(ports, rank, options, 20000, &wire);
    const CallerStream stream;
    body({rank, *wire, *ring, stream.handle, [&] { meeting.meet(); }});
    meeting.meet();
    ring->close();
    sync(stream.handle);
  });
}

// Bytes that differ between messages.
inline int seed(int src, int dst, int round) { return 1000 * round + 31 * src + dst; }

// One message of this rank to and from every rank in `peers`, posted together.
struct Messages {
  Messages(const StagedRank& it, std::vector<int> with, std::size_t nbytes, int round)
      : it(it), peers(std::move(with)), round(round), in(peers.size(), Buffer(nbytes)) {
    std::vector<Send> sends;
    std::vector<Recv> recvs;
    for (const int peer : peers) out.push_back(pattern(nbytes, seed(it.rank, peer, round)));
    for (std::size_t i = 0; i < peers.size(); ++i) {
      sends.push_back({peers[i], out[i].data(), nbytes});
      recvs.push_back({peers[i], in[i].data(), nbytes});
    }
    ticket = it.ring.exchange(sends, recvs, it.stream);
  }
  // Waits, and checks what came.
  void finish() {
    times = it.ring.wait(ticket, it.stream);
    sync(it.stream);
    for (std::size_t i = 0; i < peers.size(); ++i) {
      REQUIRE(in[i] == pattern(in[i].size(), seed(peers[i], it.rank, round)));
    }
  }

  const StagedRank it;
  const std::vector<int> peers;
  const int round;
  std::vector<Buffer> out, in;
  Ticket ticket = 0;
  Times times;
};

inline void swap(const StagedRank& it, const std::vector<int>& peers, std::size_t nbytes,
                 int round) {
  Messages(it, peers, nbytes, round).finish();
}

// In place: the address has been posted.
inline void fill(Buffer& buffer, int seed) {
  const Buffer bytes = pattern(buffer.size(), seed);
  std::copy(bytes.begin(), bytes.end(), buffer.begin());
}

inline bool refuses(const std::function<void()>& action, const std::string& words) {
  try {
    action();
  } catch (const ArgumentError& error) {
    return contains(error.what(), words);
  }
  return false;
}

}  // namespace ringkern
