// In which order a ring for a GPU's memory over TCP does things: what runs beside what, what waits
// for what, and what waits for nothing.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <memory>
#include <numeric>
#include <vector>

#include "staged_ranks.h"

using namespace ringkern;
using std::chrono::milliseconds;

namespace {

// The rank's thread has looked so often since.
void until_looked(const StagedRank& it) {
  const auto looks = [&] { return stub::questions() + it.wire.questions; };
  const int before = looks();
  until([&] { return looks() >= before + 20; });
}

}  // namespace

TEST_CASE("an exchange begins behind the caller's work, and what follows is behind it") {
  const Gate gate;
  run_staged(2, staging_options(), [&](const StagedRank& it) {
    Buffer out(1000), in(1000, 0xee), used(1000);
    const int peer = 1 - it.rank;
    if (it.rank == 0) gate.put(it.stream);
    put_work(it.stream, [&] { fill(out, it.rank); });
    const Ticket ticket =
        it.ring.exchange({{peer, out.data(), 1000}}, {{peer, in.data(), 1000}}, it.stream);
    if (it.rank == 1) until([&] { return it.wire.sent().size() == 2; });  // has no slot left
    it.meet();
    until_looked(it);
    if (it.rank == 0) {
      // Its copies may be in the queue, and no more than that.
      CHECK(it.wire.posted() == 0);
      CHECK(times("DtoH done", out) == 0);
      CHECK(in == Buffer(1000, 0xee));
      CHECK_FALSE(it.ring.poll(ticket, milliseconds(0)));
    }
    it.meet();
    gate.open();
    it.ring.wait(ticket, it.stream);
    put_work(it.stream, [&] { used = in; });
    sync(it.stream);
    CHECK(used == pattern(1000, peer));
  });
}

TEST_CASE("the first copies are given to the GPU before it has come to the exchange") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    const Gate gate;
    gate.put(it.stream);
    Messages messages(it, {1 - it.rank}, 1000, 0);
    until([&] { return times("DtoH put", messages.out[0]) == 2; });
    CHECK(times("DtoH done", messages.out[0]) == 0);
    it.meet();
    gate.open();
    messages.finish();
  });
}

TEST_CASE("no piece is on the wire before its copy has passed") {
  run_staged(2, staging_options(64, 4), [](const StagedRank& it) {
    stub::let_copies("DtoH", 0);
    it.meet();
    Messages messages(it, {1 - it.rank}, 1000, 0);
    until([&] { return times("DtoH put", messages.out[0]) == 4; });
    until_looked(it);
    CHECK(it.wire.sent().empty());
    it.meet();
    // Both ranks' copies are let together; a rank's own are counted.
    for (int copies = 1; copies <= 3; ++copies) {
      if (it.rank == 0) stub::let_copies("DtoH", 1);
      it.meet();
      until([&] {
        return it.wire.sent().size() ==
               static_cast<std::size_t>(times("DtoH done", messages.out[0]));
      });
      it.meet();
    }
    if (it.rank == 0) stub::let_copies("DtoH", -1);
    messages.finish();
  });
}

TEST_CASE("while a piece is on the wire the next ones are copied, into all slots but its own") {
  for (const int slots : {2, 4}) {
    CAPTURE(slots);
    run_staged(2, staging_options(64, slots), [&](const StagedRank& it) {
      const int pieces = 12;
      it.wire.let_out = 0;
      Messages messages(it, {1 - it.rank}, 64 * (pieces - 1) + 1, 0);
      for (int done = 0; done + slots <= pieces; ++done) {
        // `done` pieces are sent, the next one is on the wire: as many more are there as slots.
        until([&] { return it.wire.sent().size() == static_cast<std::size_t>(done + slots); });
        until_looked(it);
        CHECK(times("DtoH put", messages.out[0]) == done + slots);
        it.wire.let_out = 1;
        until([&] { return it.wire.let_out == 0; });
      }
      it.wire.let_out = -1;
      messages.finish();
      CHECK(it.wire.sent().size() == static_cast<std::size_t>(pieces));
    });
  }
}

TEST_CASE("while a piece is copied to the GPU the next ones come, into all slots but its own") {
  run_staged(2, staging_options(64, 3), [](const StagedRank& it) {
    if (it.rank == 0) stub::let_copies("HtoD", 0);
    it.meet();
    Buffer buffer = pattern(1000, 5);
    if (it.rank == 1) {
      it.ring.wait(it.ring.exchange({{0, buffer.data(), 1000}}, {}, it.stream), it.stream);
      return;
    }
    Buffer in(1000);
    const Ticket ticket = it.ring.exchange({}, {{1, in.data(), 1000}}, it.stream);
    for (int copied = 0; copied <= 10; ++copied) {
      until([&] { return times("HtoD put", in) == copied + 3; });
      until_looked(it);
      CHECK(it.wire.posted() == static_cast<std::size_t>(copied + 3));
      CHECK(times("HtoD done", in) == copied);
      stub::let_copies("HtoD", 1);
      until([&] { return times("HtoD done", in) == copied + 1; });
    }
    stub::let_copies("HtoD", -1);
    it.ring.wait(ticket, it.stream);
    sync(it.stream);
    CHECK(in == buffer);
  });
}

TEST_CASE("copies to the host that wait do not stop copies to the GPU") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    const Gate gate;
    const CallerStream own;
    const Stream late = own.handle;
    Buffer there = pattern(1000, 1), back = pattern(1000, 2), in(1000);
    if (it.rank == 0) {
      gate.put(late);
      const Ticket held = it.ring.exchange({{1, there.data(), 1000}}, {}, late);
      until([&] { return times("DtoH put", there) == 2; });
      it.ring.wait(it.ring.exchange({}, {{1, in.data(), 1000}}, it.stream), it.stream);
      sync(it.stream);
      CHECK(in == back);
      CHECK(times("DtoH done", there) == 0);
      gate.open();
      it.ring.wait(held, late);
    } else {
      it.ring.wait(it.ring.exchange({{0, back.data(), 1000}}, {}, it.stream), it.stream);
      it.ring.wait(it.ring.exchange({}, {{0, in.data(), 1000}}, it.stream), it.stream);
      sync(it.stream);
      CHECK(in == there);
    }
    sync(late);
  });
}

TEST_CASE("peers that come late in every order: nobody waits for slots that another has") {
  for (const int world_size : {3, 5}) {
    std::vector<int> order(static_cast<std::size_t>(world_size - 1));
    std::iota(order.begin(), order.end(), 1);
    int tried = 0;
    do {
      if (world_size == 5 && tried++ % 5 != 0) continue;
      std::atomic<std::size_t> turn{0};
      run_staged(world_size, staging_options(), [&](const StagedRank& it) {
        const std::size_t nbytes = 64 * 9 + 5;
        if (it.rank == 0) {
          // To and from all peers: together, then one after the other.
          std::vector<std::unique_ptr<Messages>> all;
          std::vector<int> peers(order);
          std::sort(peers.begin(), peers.end());
          all.push_back(std::make_unique<Messages>(it, peers, nbytes, 0));
          for (const int peer : peers) {
            all.push_back(std::make_unique<Messages>(it, std::vector<int>{peer}, nbytes, 1));
          }
          for (auto& messages : all) messages->finish();
        }
        if (it.rank == 0) return;
        until([&] { return order[turn] == it.rank; });
        Messages first(it, {0}, nbytes, 0), second(it, {0}, nbytes, 1);
        second.finish();
        first.finish();
        if (turn + 1 < order.size()) ++turn;
      });
    } while (std::next_permutation(order.begin(), order.end()));
  }
}

TEST_CASE("an exchange that the GPU has not come to does not hold up an older one") {
  const Gate gate;
  run_staged(3, staging_options(), [&](const StagedRank& it) {
    const CallerStream own;
    const Stream late = own.handle;
    const int next = (it.rank + 1) % 3, prev = (it.rank + 2) % 3;
    Buffer out = pattern(1000, it.rank), first(1000), second(1000);
    it.wire.let_out = 0;
    const Ticket older =
        it.ring.exchange({{next, out.data(), 1000}}, {{prev, first.data(), 1000}}, it.stream);
    until([&] { return it.wire.sent().size() == 2; });
    gate.put(late);
    const Ticket younger =
        it.ring.exchange({{prev, out.data(), 1000}}, {{next, second.data(), 1000}}, late);
    until_looked(it);
    it.wire.let_out = -1;
    it.ring.wait(older, it.stream);  // although 14 of its pieces had no slot until now
    sync(it.stream);
    CHECK(first == pattern(1000, prev));
    CHECK_FALSE(it.ring.poll(younger, milliseconds(0)));
    it.meet();
    gate.open();
    it.ring.wait(younger, late);
    sync(late);
    CHECK(second == pattern(1000, next));
  });
}

TEST_CASE("messages of the host come behind the pieces that were posted before them") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    const int peer = 1 - it.rank;
    Transport& host = it.ring.host();
    std::vector<std::unique_ptr<Messages>> staged;
    std::vector<Buffer> out, in;
    std::vector<Ticket> tickets;
    // All messages have the size of a piece: one in a wrong place would be taken for another.
    for (int round = 0; round < 20; ++round) {
      staged.push_back(std::make_unique<Messages>(it, std::vector<int>{peer}, 63, round));
      out.push_back(pattern(63, 500 * round + it.rank));
      in.emplace_back(63);
      tickets.push_back(
          host.exchange({{peer, out.back().data(), 63}}, {{peer, in.back().data(), 63}}, 0));
    }
    for (int round = 0; round < 20; ++round) {
      const auto i = static_cast<std::size_t>(round);
      host.wait(tickets[i], 0);
      CHECK(in[i] == pattern(63, 500 * round + peer));
      staged[i]->finish();
    }
  });
}

TEST_CASE("a message of the host waits for the GPU to come to earlier exchanges") {
  const Gate gate;
  run_staged(2, staging_options(), [&](const StagedRank& it) {
    const int peer = 1 - it.rank;
    if (it.rank == 0) gate.put(it.stream);
    Messages messages(it, {peer}, 63, 0);
    Buffer out = pattern(63, 90 + it.rank), in(63);
    std::atomic<bool> posted{false};
    auto host = std::async(std::launch::async, [&] {
      const Ticket ticket =
          it.ring.host().exchange({{peer, out.data(), 63}}, {{peer, in.data(), 63}}, 0);
      posted = true;
      it.ring.host().wait(ticket, 0);
    });
    if (it.rank == 1) until([&] { return posted.load(); });
    it.meet();
    if (it.rank == 0) {
      until_looked(it);
      CHECK_FALSE(posted);
      gate.open();
    }
    host.get();
    CHECK(in == pattern(63, 90 + peer));
    messages.finish();
  });
}

TEST_CASE("several threads post and wait at once, each for a peer of its own") {
  run_staged(3, staging_options(), [](const StagedRank& it) {
    std::vector<std::future<void>> threads;
    for (int peer = 0; peer < 3; ++peer) {
      threads.push_back(std::async(std::launch::async, [&it, peer] {
        const CallerStream stream;
        for (int round = 0; round < 30; ++round) {
          swap({it.rank, it.wire, it.ring, stream.handle, it.meet}, {peer}, 200, round);
        }
      }));
    }
    for (auto& thread : threads) thread.get();
    until([&] { return it.ring.settled() == 90; });
  });
}
