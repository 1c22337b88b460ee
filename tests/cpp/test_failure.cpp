// Rings that fail: every rank must learn it in time, and name the same rank.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "crc32c.h"
#include "failing_ranks.h"

using namespace ringkern;
using Buffer = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;

TEST_CASE("an abort reaches every rank with its origin and its words") {
  Ports ports(5);
  std::vector<Failure> failures(5);
  std::unique_ptr<Transport> rings[5];
  in_parallel(5, [&](int rank) { rings[rank] = ports.join(rank, test_options()); });
  in_parallel(5, [&](int rank) {
    if (rank == 3) rings[rank]->abort("the \xc3\xa9nd \xff");
    Failure& failure = failures[static_cast<std::size_t>(rank)];
    failure = turn_until_failure(rank, 5, *rings[rank]);
    if (rank != 0) check_stays_failed(*rings[rank], failure);
  });
  for (const Failure& failure : failures) {
    CHECK(failure.kind == Kind::kTransport);
    CHECK(failure.origin == 3);
    CHECK(failure.text.rfind("rank 3 failed", 0) == 0);
    CHECK(contains(failure.text, "rank 3 of 5 was aborted: the \xc3\xa9nd ?"));
  }
  CHECK(contains(failures[4].text, "(told by rank "));
  CHECK_FALSE(failures[3].text.find("told by") != std::string::npos);
}

TEST_CASE("sizes that differ are an error on both sides, whoever posts first") {
  for (const int first : {0, 1}) {
    for (const auto& [sent, expected] : {std::pair<std::size_t, std::size_t>{16, 8},
                                         {8, 16},
                                         {0, 8},
                                         {8, 0},
                                         {3000000, 2999999}}) {
      CAPTURE(first);
      CAPTURE(sent);
      CAPTURE(expected);
      std::promise<void> posted;
      auto first_posted = posted.get_future();
      Ports ports(2);
      in_parallel(2, [&, sent = sent, expected = expected](int rank) {
        const auto ring = ports.join(rank, test_options());
        Buffer buffer(3000000);
        if (rank != first) first_posted.wait();
        const Failure failure = failure_of([&] {
          const Ticket ticket = rank == 0 ? ring->exchange({{1, buffer.data(), sent}}, {}, 0)
                                          : ring->exchange({}, {{0, buffer.data(), expected}}, 0);
          if (rank == first) posted.set_value();
          ring->wait(ticket, 0);
        });
        CHECK(failure.kind == Kind::kProtocol);
        CHECK(failure.origin == 0);
        CHECK(contains(failure.text, concat("has ", sent, " bytes where it is sent and ", expected,
                                            " bytes where it is received")));
      });
    }
  }
}

TEST_CASE("a rank that never posts is blamed by all, itself too") {
  Ports ports(5);
  const auto start = Clock::now();
  in_parallel(5, [&](int rank) {
    const auto ring = ports.join(rank, test_options(1, false, 3000));
    Failure failure;
    if (rank == 2) {
      // It is alive: its loop answers, whatever its caller does.
      failure = failure_of([&] {
        for (;;) ring->wait(ring->exchange({}, {}, 0), 0);
      });
    } else {
      failure = turn_until_failure(rank, 5, *ring);
    }
    CHECK(failure.origin == 2);
    CHECK(failure.kind == Kind::kTimeout);
    CHECK(contains(failure.text, "Rank 2 is alive but has not posted its side"));
  });
  CHECK(Clock::now() - start < std::chrono::seconds(6));
}

TEST_CASE("a rank that answers nothing is blamed by all within the timeout") {
  Ports ports(5);
  // Rank 4 is made by hand. Its sockets stay open and nobody reads them, as after SIGSTOP.
  std::optional<Puppet> to_0, to_3;
  auto puppet = std::async(std::launch::async, [&] {
    to_0.emplace(ports.addresses[0], 4, 0, 5);
    to_3.emplace(ports.addresses[3], 4, 3, 5);
  });
  std::atomic<std::int64_t> longest_ms{0};
  in_parallel(4, [&](int rank) {
    const auto ring = ports.join(rank, test_options(1, false, 2000));
    const auto start = Clock::now();
    const Failure failure = turn_until_failure(rank, 5, *ring);
    const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start);
    if (took.count() > longest_ms) longest_ms = took.count();
    CHECK(failure.origin == 4);
    CHECK(failure.kind == Kind::kTimeout);
    CHECK(contains(failure.text, "Rank 4 does not answer"));
  });
  puppet.get();
  CHECK(longest_ms < 2000 + 1000);  // the second is for a loaded machine
}

TEST_CASE("ranks that wait for each other are told so when the time is over") {
  Ports ports(2);
  in_parallel(2, [&](int rank) {
    const auto ring = ports.join(rank, test_options(1, false, 1000));
    int word = 0;
    const Failure failure =
        failure_of([&] { ring->wait(ring->exchange({}, {{1 - rank, &word, 4}}, 0), 0); });
    CHECK(failure.kind == Kind::kTimeout);
    CHECK(contains(failure.text, "is alive and waits too"));
    CHECK(contains(failure.text, "receiving message 0 from rank "));
    CHECK(contains(failure.text, "0 of 4 bytes after 1.0 s"));
  });
}

TEST_CASE("a rank that vanishes is named, before, during and after an exchange") {
  for (const char* when : {"before", "during", "after"}) {
    CAPTURE(when);
    const std::string moment = when;
    Ports ports(3);
    // Rank 2 is made by hand.
    std::optional<Puppet> to_0, to_1;
    std::promise<void> both_up, vanished;
    auto gone = vanished.get_future().share();
    auto puppet = std::async(std::launch::async, [&] {
      to_0.emplace(ports.addresses[0], 2, 0, 3);
      to_1.emplace(ports.addresses[1], 2, 1, 3);
      both_up.get_future().wait();
      if (moment == "during") {
        Header half = to_0->data(0, 1000);
        to_0->send(half, Buffer(500));
      } else if (moment == "after") {
        to_0->send(to_0->data(0, 1000), Buffer(1000, 5));
        to_1->send(to_1->header(Type::kReady, 0, 1000));
        REQUIRE(to_1->read(1));
      }
      to_0->vanish();
      to_1->vanish();
      vanished.set_value();
    });
    std::atomic<int> up{0};
    in_parallel(2, [&](int rank) {
      const auto ring = ports.join(rank, test_options(1, false, 10000));
      if (++up == 2) both_up.set_value();
      if (moment == "before") gone.wait();
      const auto start = Clock::now();
      const Failure failure = turn_until_failure(rank, 3, *ring);
      CHECK(failure.origin == 2);
      CHECK(failure.kind == Kind::kTransport);
      CHECK(contains(failure.text, "Rank 2 has probably stopped"));
      CHECK(Clock::now() - start < std::chrono::seconds(3));
    });
    puppet.get();
  }
}

TEST_CASE("what a rank wrote before it vanished still arrives") {
  for (int i = 0; i < 10; ++i) {
    Ports ports(2);
    std::optional<Puppet> peer;
    auto puppet =
        std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
    const auto ring = ports.join(0, test_options());
    puppet.get();
    // Several pieces, so that the control socket's end is seen between them.
    Buffer in(4 * kPieceBytes);
    const Ticket ticket = ring->exchange({}, {{1, in.data(), in.size()}}, 0);
    for (std::size_t offset = 0; offset < in.size(); offset += kPieceBytes) {
      Header header = peer->data(0, kPieceBytes);
      header.offset = offset;
      header.total = in.size();
      if (offset + kPieceBytes == in.size()) peer->socket(0).close();
      peer->send(header, Buffer(kPieceBytes, 7));
    }
    peer->vanish();
    ring->wait(ticket, 0);
    CHECK(in == Buffer(in.size(), 7));
  }
}

TEST_CASE("a data socket that breaks alone is blamed after a short grace") {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet = std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
  const auto ring = ports.join(0, test_options());
  puppet.get();
  int word = 0;
  const Ticket ticket = ring->exchange({}, {{1, &word, 4}}, 0);
  peer->socket(1).close();
  const Failure failure = failure_of([&] { ring->wait(ticket, 0); });
  CHECK(failure.origin == 1);
  CHECK(failure.kind == Kind::kTransport);
  CHECK(contains(failure.text, "connection closed"));
}

TEST_CASE("an abort that comes with a broken data socket explains it") {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet = std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
  const auto ring = ports.join(0, test_options());
  puppet.get();
  int word = 0;
  const Ticket ticket = ring->exchange({}, {{1, &word, 4}}, 0);
  peer->socket(1).close();
  Header abort = peer->header(Type::kAbort, 1);
  abort.offset = static_cast<std::uint64_t>(Kind::kProtocol);
  const std::string words = "the true reason";
  abort.nbytes = static_cast<std::uint32_t>(words.size());
  abort.payload_crc = crc32c(words.data(), words.size());
  peer->send(abort, Buffer(words.begin(), words.end()));
  const Failure failure = failure_of([&] { ring->wait(ticket, 0); });
  CHECK(failure.kind == Kind::kProtocol);
  CHECK(failure.text == "rank 1 failed (told by rank 1): the true reason");
}

TEST_CASE("after a failure the buffers belong to the caller again") {
  for (int i = 0; i < 5; ++i) {
    Ports ports(2);
    std::optional<Puppet> peer;
    auto puppet =
        std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
    const auto ring = ports.join(0, test_options());
    puppet.get();
    Buffer buffer(1000, 1);
    const Ticket ticket = ring->exchange({}, {{1, buffer.data(), buffer.size()}}, 0);
    peer->send(peer->data(0, 1000), Buffer(500, 2));
    // Two answers: by the second the loop has been at the data too, and is in the payload.
    for (int i = 0; i < 2; ++i) {
      peer->send(peer->header(Type::kPing));
      auto header = peer->read(0);
      while (header && header->type != Type::kPong) header = peer->read(0);
      REQUIRE(header);
    }
    ring->abort("enough");
    CHECK_THROWS_AS(ring->wait(ticket, 0), TransportError);
    buffer.assign(1000, 3);
    write_all(peer->socket(1), Buffer(500, 4).data(), 500);
    // Nothing can be waited for: what must not happen gets 20 ms in which to happen.
    const auto end = Clock::now() + std::chrono::milliseconds(20);
    while (Clock::now() < end && buffer[500] == 3) std::this_thread::yield();
    ring->close();  // and with it the loop
    REQUIRE(buffer == Buffer(1000, 3));
  }
}

TEST_CASE("goodbye: what was written still arrives, what was not fails") {
  Ports ports(2);
  std::promise<void> left;
  auto has_left = left.get_future();
  in_parallel(2, [&](int rank) {
    auto ring = ports.join(rank, test_options());
    Buffer buffer(1000, static_cast<std::uint8_t>(rank));
    if (rank == 1) {
      ring->wait(ring->exchange({{0, buffer.data(), 1000}}, {}, 0), 0);
      ring->close();
      left.set_value();
      return;
    }
    ring->wait(ring->exchange({}, {{1, buffer.data(), 1000}}, 0), 0);
    CHECK(buffer == Buffer(1000, 1));
    has_left.wait();
    const Failure failure =
        failure_of([&] { ring->wait(ring->exchange({}, {{1, buffer.data(), 1000}}, 0), 0); });
    CHECK(failure.origin == 1);
    CHECK(failure.kind == Kind::kTransport);
    CHECK(contains(failure.text, "closed its ring"));
  });
}

TEST_CASE("a rank that leaves at once after its last exchange does not disturb the others") {
  for (int i = 0; i < 30; ++i) {
    Ports ports(3);
    in_parallel(3, [&](int rank) {
      const auto ring = ports.join(rank, test_options());
      Buffer out(300000, static_cast<std::uint8_t>(rank)), in(300000);
      ring->wait(ring->exchange({{(rank + 1) % 3, out.data(), out.size()}},
                                {{(rank + 2) % 3, in.data(), in.size()}}, 0),
                 0);
      CHECK(in == Buffer(300000, static_cast<std::uint8_t>((rank + 2) % 3)));
    });
  }
}

TEST_CASE("close ends a wait on another thread, and may be called again") {
  Ports ports(2);
  std::unique_ptr<Transport> rings[2];
  Ticket tickets[2];
  int words[2];
  in_parallel(2, [&](int rank) { rings[rank] = ports.join(rank, test_options()); });
  for (const int rank : {0, 1}) {
    tickets[rank] = rings[rank]->exchange({}, {{1 - rank, &words[rank], 4}}, 0);
  }
  // Ranks 0 and 1 wait; three more threads close rank 0, all at once.
  in_parallel(5, [&](int i) {
    if (i > 1) return rings[0]->close();
    const Failure failure = failure_of([&] { rings[i]->wait(tickets[i], 0); });
    CHECK(contains(failure.text, "closed"));
    CHECK(failure.origin == 0);
  });
  for (const auto& ring : rings) {
    ring->close();
    ring->close();
    CHECK_THROWS_AS(ring->exchange({}, {}, 0), TransportError);
    ring->stats();
  }
}
