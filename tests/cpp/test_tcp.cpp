// Rings that work.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core.h"
#include "ranks.h"

using namespace ringkern;
using Buffer = std::vector<std::uint8_t>;

namespace {

// One message from every rank in `from` to every rank in `to`; checks what came.
void exchange(Transport& ring, int rank, const std::vector<int>& to, const std::vector<int>& from,
              std::size_t nbytes, int round = 0) {
  const auto seed = [&](int src, int dst) { return 1000 * round + 31 * src + dst; };
  std::vector<Buffer> out, in;
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  for (const int peer : to) out.push_back(pattern(nbytes, seed(rank, peer)));
  for (std::size_t i = 0; i < from.size(); ++i) in.emplace_back(nbytes);
  for (std::size_t i = 0; i < to.size(); ++i) sends.push_back({to[i], out[i].data(), nbytes});
  for (std::size_t i = 0; i < from.size(); ++i) recvs.push_back({from[i], in[i].data(), nbytes});
  const Times times = ring.wait(ring.exchange(sends, recvs, 0), 0);
  CHECK(times.posted_ns > 0);
  CHECK(times.done_ns >= times.posted_ns);
  for (std::size_t i = 0; i < from.size(); ++i) {
    REQUIRE(in[i] == pattern(nbytes, seed(from[i], rank)));
  }
}

std::vector<int> others(int rank, int world_size) {
  std::vector<int> ranks;
  for (int i = 1; i < world_size; ++i) ranks.push_back((rank + i) % world_size);
  return ranks;
}

}  // namespace

TEST_CASE("round the ring, and between all ranks, at every world size") {
  for (const int world_size : {1, 2, 3, 5, 8}) {
    for (const int lanes : {1, 4}) {
      for (const bool checksum : {false, true}) {
        CAPTURE(world_size);
        CAPTURE(lanes);
        CAPTURE(checksum);
        run_ranks(world_size, test_options(lanes, checksum), [&](int rank, Transport& ring) {
          const std::size_t sizes[] = {0, 1, 8, 4095, 100003, 2 * kPieceBytes + 1};
          int round = 0;
          for (const std::size_t nbytes : sizes) {
            if (world_size > 1) {
              const int next = (rank + 1) % world_size;
              const int prev = (rank + world_size - 1) % world_size;
              exchange(ring, rank, {next}, {prev}, nbytes, round++);
            }
            const auto all = others(rank, world_size);
            if (nbytes < kPieceBytes) exchange(ring, rank, all, all, nbytes, round++);
          }
        });
      }
    }
  }
}

TEST_CASE("the bytes that are counted are the bytes that were posted") {
  run_ranks(3, test_options(), [](int rank, Transport& ring) {
    exchange(ring, rank, others(rank, 3), others(rank, 3), 1000);
    exchange(ring, rank, {(rank + 1) % 3}, {(rank + 2) % 3}, kPieceBytes + 1);
    const Stats stats = ring.stats();
    CHECK(std::accumulate(stats.bytes_sent.begin(), stats.bytes_sent.end(), 0ul) ==
          2000 + kPieceBytes + 1);
    CHECK(stats.bytes_received[static_cast<std::size_t>((rank + 2) % 3)] == 1000 + kPieceBytes + 1);
    CHECK(stats.bytes_sent[static_cast<std::size_t>(rank)] == 0);
    CHECK(stats.messages_sent == 3);
    CHECK(stats.messages_received == 3);
    CHECK(stats.rejected_connections == 0);
  });
}

TEST_CASE("payloads far larger than the sockets' buffers, both ways at once") {
  for (const int lanes : {1, 3}) {
    run_ranks(2, test_options(lanes), [](int rank, Transport& ring) {
      // Autotuning stops at 4 to 6 MiB here; ten times that is more than two of them hold.
      exchange(ring, rank, {1 - rank}, {1 - rank}, std::size_t{64} << 20);
    });
  }
}

TEST_CASE("many small messages in flight arrive in the order posted") {
  for (const int lanes : {1, 4}) {
    run_ranks(2, test_options(lanes), [](int rank, Transport& ring) {
      constexpr int kCount = 5000;
      std::vector<int> out(kCount), in(kCount, -1);
      std::vector<Ticket> tickets;
      for (int i = 0; i < kCount; ++i) {
        out[static_cast<std::size_t>(i)] = i + rank;
        tickets.push_back(
            ring.exchange({{1 - rank, &out[static_cast<std::size_t>(i)], sizeof(int)}},
                          {{1 - rank, &in[static_cast<std::size_t>(i)], sizeof(int)}}, 0));
      }
      // In another order than posted, which is allowed.
      std::reverse(tickets.begin(), tickets.end());
      for (const Ticket ticket : tickets) ring.wait(ticket, 0);
      for (int i = 0; i < kCount; ++i) REQUIRE(in[static_cast<std::size_t>(i)] == i + 1 - rank);
    });
  }
}

TEST_CASE("sends that are posted long before the peer's receives") {
  for (const int lanes : {1, 4}) {
    std::promise<void> posted;
    auto all_posted = posted.get_future();
    run_ranks(2, test_options(lanes), [&](int rank, Transport& ring) {
      // Mixed sizes, so that lanes stop at pieces of different messages.
      std::vector<Buffer> buffers;
      std::vector<Ticket> tickets;
      for (int i = 0; i < 12; ++i) {
        const std::size_t nbytes = i % 3 ? static_cast<std::size_t>(i) : 3 * kPieceBytes / 2;
        buffers.push_back(rank == 0 ? pattern(nbytes, i) : Buffer(nbytes));
      }
      if (rank == 1) all_posted.wait();
      for (auto& buffer : buffers) {
        if (rank == 0) tickets.push_back(ring.exchange({{1, buffer.data(), buffer.size()}}, {}, 0));
        if (rank == 1) tickets.push_back(ring.exchange({}, {{0, buffer.data(), buffer.size()}}, 0));
      }
      if (rank == 0) posted.set_value();
      for (const Ticket ticket : tickets) ring.wait(ticket, 0);
      for (int i = 0; i < 12; ++i) {
        const auto& buffer = buffers[static_cast<std::size_t>(i)];
        REQUIRE(buffer == pattern(buffer.size(), i));
      }
    });
  }
}

TEST_CASE("receives that are posted long before the peer's sends") {
  std::promise<void> posted;
  auto all_posted = posted.get_future();
  run_ranks(2, test_options(), [&](int rank, Transport& ring) {
    std::vector<std::uint64_t> words(1000);
    std::vector<Ticket> tickets;
    if (rank == 1) all_posted.wait();
    for (std::size_t i = 0; i < words.size(); ++i) {
      if (rank == 1) words[i] = i * i;
      tickets.push_back(rank == 0 ? ring.exchange({}, {{1, &words[i], 8}}, 0)
                                  : ring.exchange({{0, &words[i], 8}}, {}, 0));
    }
    if (rank == 0) posted.set_value();
    for (const Ticket ticket : tickets) ring.wait(ticket, 0);
    for (std::size_t i = 0; i < words.size(); ++i) REQUIRE(words[i] == i * i);
  });
}

TEST_CASE("an exchange of nothing is done at once") {
  run_ranks(2, test_options(), [](int, Transport& ring) {
    const Ticket ticket = ring.exchange({}, {}, 0);
    CHECK(ring.poll(ticket, std::chrono::milliseconds(0)));
    const Times times = ring.wait(ticket, 0);
    CHECK(times.done_ns == times.posted_ns);
    CHECK_THROWS_AS(ring.wait(ticket, 0), ArgumentError);
    CHECK_THROWS_AS(ring.wait(12345, 0), ArgumentError);
  });
}

TEST_CASE("a call that is wrong posts nothing") {
  run_ranks(2, test_options(), [](int rank, Transport& ring) {
    int word = 0;
    const Send good{1 - rank, &word, sizeof(word)};
    CHECK_THROWS_AS(ring.exchange({good, {rank, &word, 4}}, {}, 0), ArgumentError);
    CHECK_THROWS_AS(ring.exchange({good}, {{2, &word, 4}}, 0), ArgumentError);
    CHECK_THROWS_AS(ring.exchange({good}, {{-1, &word, 4}}, 0), ArgumentError);
    CHECK_THROWS_AS(ring.exchange({good}, {{1 - rank, nullptr, 4}}, 0), ArgumentError);
    const std::vector<Send> many(65537, good);
    CHECK_THROWS_AS(ring.exchange(many, {}, 0), ArgumentError);
    exchange(ring, rank, {1 - rank}, {1 - rank}, 100);
    CHECK(ring.stats().messages_sent == 1);
  });
}

TEST_CASE("several threads share a transport") {
  run_ranks(2, test_options(), [](int rank, Transport& ring) {
    // One thread posts all sends, another all receives: each direction has one order.
    std::vector<std::uint32_t> out(500), in(500);
    std::iota(out.begin(), out.end(), 7);
    in_parallel(2, [&](int which) {
      std::vector<Ticket> tickets;
      for (std::size_t i = 0; i < out.size(); ++i) {
        tickets.push_back(which ? ring.exchange({{1 - rank, &out[i], 4}}, {}, 0)
                                : ring.exchange({}, {{1 - rank, &in[i], 4}}, 0));
      }
      for (const Ticket ticket : tickets) ring.wait(ticket, 0);
    });
    CHECK(in == out);
  });
}

TEST_CASE("a peer that dials before this rank has begun to connect") {
  Listener listener("127.0.0.1");
  const std::string address = listener.address();
  Core core(std::move(listener), 0, {Address::parse(address), Address::parse("127.0.0.1:9")},
            {test_ring_id(), 2, 1, false}, test_secret(), std::chrono::seconds(10));
  Puppet peer(address, 1, 0, 2);
  peer.send(peer.header(Type::kPing));
  REQUIRE(peer.read(0));  // so the link is up
  const Ticket ticket = core.connect();
  CHECK(core.poll(ticket, std::chrono::milliseconds(0)));
}

TEST_CASE("arguments of make_tcp") {
  Ports ports(2);
  const auto join = [&](int rank, const std::vector<std::string>& addresses, TcpOptions options,
                        std::size_t secret_bytes = 32) {
    make_tcp(Listener("127.0.0.1"), rank, addresses, test_ring_id(), Bytes(secret_bytes), options);
  };
  CHECK_THROWS_AS(join(2, ports.addresses, test_options()), ArgumentError);
  CHECK_THROWS_AS(join(-1, ports.addresses, test_options()), ArgumentError);
  CHECK_THROWS_AS(join(0, {}, test_options()), ArgumentError);
  CHECK_THROWS_AS(join(0, ports.addresses, test_options(0)), ArgumentError);
  CHECK_THROWS_AS(join(0, ports.addresses, test_options(17)), ArgumentError);
  CHECK_THROWS_AS(join(0, ports.addresses, test_options(1, false, 0)), ArgumentError);
  CHECK_THROWS_AS(join(0, ports.addresses, test_options(), 31), ArgumentError);
  for (const char* address : {"localhost:1", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536",
                              "::1:80", "[127.0.0.1]:80", "127.0.0.1:8x", ":80", ""}) {
    CAPTURE(address);
    CHECK_THROWS_AS(join(0, {address, address}, test_options()), ArgumentError);
  }
  for (const char* host : {"0.0.0.0", "::", "::ffff:0.0.0.0", "localhost", ""}) {
    CAPTURE(host);
    CHECK_THROWS_AS(Listener{host}, ArgumentError);
  }
}

TEST_CASE("a ring over IPv6") {
  std::optional<Ports> ports;
  try {
    ports.emplace(2, "::1");
  } catch (const UnsupportedError& error) {
    MESSAGE("skipped: " << error.what());
    return;
  }
  in_parallel(2, [&](int rank) {
    const auto ring = ports->join(rank, test_options());
    exchange(*ring, rank, {1 - rank}, {1 - rank}, 100000);
  });
}

TEST_CASE("IPv6 addresses are written in brackets") {
  CHECK(Address::parse("[::1]:29501").text() == "[::1]:29501");
  CHECK(Address::parse("10.0.0.2:29501").text() == "10.0.0.2:29501");
  CHECK(Address::parse("[::1]:1").is_loopback());
  CHECK_FALSE(Address::parse("10.0.0.2:1").is_loopback());
}
