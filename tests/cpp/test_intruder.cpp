// What comes from outside, or from a rank that does not keep to the protocol.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <chrono>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "crc32c.h"
#include "ranks.h"

using namespace ringkern;
using Buffer = std::vector<std::uint8_t>;

namespace {

// Rank 0 of two expects 1000 bytes as message 0; what does rank 1, made by hand, cause?
Failure failure_after(const std::function<void(Puppet&)>& act, int lanes = 1,
                      bool checksum = false) {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet = std::async(std::launch::async,
                           [&] { peer.emplace(ports.addresses[0], 1, 0, 2, lanes, checksum); });
  const auto ring = ports.join(0, test_options(lanes, checksum));
  puppet.get();
  Buffer buffer(1000, 0xaa);
  const Ticket ticket = ring->exchange({}, {{1, buffer.data(), buffer.size()}}, 0);
  act(*peer);
  const Failure failure = failure_of([&] { ring->wait(ticket, 0); });
  CHECK(failure.origin == 1);
  // The peer is told, whoever it is: READY first, then the reason.
  while (const auto header = peer->read(0)) {
    if (header->type == Type::kAbort) return failure;
  }
  FAIL("no ABORT");
  return failure;
}

}  // namespace

TEST_CASE("frames that may not come are refused, before their payload is read") {
  const auto refused = [](const std::function<void(Puppet&)>& act, const char* words,
                          int lanes = 1) {
    const Failure failure = failure_after(act, lanes);
    CHECK(failure.kind == Kind::kProtocol);
    CHECK(contains(failure.text, words));
  };
  const auto changed = [&](const std::function<void(Header&)>& change, const char* words,
                           int lanes = 1) {
    refused(
        [&](Puppet& peer) {
          Header header = peer.data(0, 1000);
          change(header);
          peer.send(header);
        },
        words, lanes);
  };
  changed([](Header& h) { h.seq = 1; }, "out of order");
  changed([](Header& h) { h.seq = std::uint64_t{1} << 63; }, "out of order", 2);
  changed([](Header& h) { h.total = 2000; }, "no message is cut into");
  changed([](Header& h) { h.total = h.nbytes = 999; }, "has 999 bytes where it is sent and 1000");
  changed([](Header& h) { h.total = ~std::uint64_t{0}, h.nbytes = kPieceBytes; }, "bytes where it");
  changed([](Header& h) { h.offset = 1; }, "no message is cut into");
  changed([](Header& h) { h.offset = kPieceBytes; }, "no message is cut into");
  changed([](Header& h) { h.nbytes = 10; }, "no message is cut into");
  changed([](Header& h) { h.nbytes = 0; }, "no message is cut into");
  changed([](Header& h) { h.flags = kChecksum; }, "has not agreed on");
  changed([](Header& h) { h.src = 0; }, "belongs elsewhere");
  changed([](Header& h) { h.dst = 1; }, "belongs elsewhere");
  refused(
      [](Puppet& peer) {
        Header header = peer.header(Type::kReady);
        header.lane = 1;
        const HeaderBytes bytes = encode(header);
        write_all(peer.socket(1), bytes.data(), bytes.size());
      },
      "a control frame on a data lane");
  refused(
      [](Puppet& peer) {
        Header header = peer.data(0, 1000);
        header.lane = 0;
        const HeaderBytes bytes = encode(header);
        write_all(peer.socket(0), bytes.data(), bytes.size());
      },
      "data on the control socket");
  refused([](Puppet& peer) { peer.send(peer.header(Type::kReady, 3, 1)); }, "announced receive 3");
  refused([](Puppet& peer) { peer.send(peer.header(Type::kAbort, 7)); }, "ABORT of no kind");
}

TEST_CASE("a message that comes twice is refused, also when nobody waits") {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet = std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
  const auto ring = ports.join(0, test_options());
  puppet.get();
  Buffer buffer(1000);
  const Ticket ticket = ring->exchange({}, {{1, buffer.data(), buffer.size()}}, 0);
  peer->send(peer->data(0, 1000), pattern(1000, 1));
  ring->wait(ticket, 0);
  peer->send(peer->data(0, 1000), pattern(1000, 2));
  const Failure failure = failure_of([&] {
    for (;;) ring->wait(ring->exchange({}, {}, 0), 0);
  });
  CHECK(failure.kind == Kind::kProtocol);
  CHECK(contains(failure.text, "a piece out of order: message 0"));
  CHECK(buffer == pattern(1000, 1));
}

TEST_CASE("a piece that comes twice over two lanes is refused") {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet =
      std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2, 2); });
  const auto ring = ports.join(0, test_options(2));
  puppet.get();
  Buffer buffer(2 * kPieceBytes);
  const Ticket ticket = ring->exchange({}, {{1, buffer.data(), buffer.size()}}, 0);
  for (const std::uint32_t lane : {1u, 2u}) {
    Header header = peer->data(0, kPieceBytes);
    header.total = buffer.size();
    header.lane = lane;
    peer->send(header, lane == 1 ? Buffer(kPieceBytes) : Buffer());
  }
  const Failure failure = failure_of([&] { ring->wait(ticket, 0); });
  CHECK(failure.kind == Kind::kProtocol);
  CHECK(contains(failure.text, "a piece that has come before"));
}

TEST_CASE("noise on an authenticated socket ends the ring, not the process") {
  std::mt19937 random(4);
  for (int i = 0; i < 20; ++i) {
    Buffer noise(200);
    for (auto& byte : noise) byte = static_cast<std::uint8_t>(random());
    const int lane = i % 2;
    const Failure failure = failure_after(
        [&](Puppet& peer) { write_all(peer.socket(lane), noise.data(), noise.size()); });
    CHECK(failure.kind == Kind::kProtocol);
    CHECK(contains(failure.text, "wrong magic number"));
  }
}

TEST_CASE("a frame that is cut off names the peer") {
  for (const std::size_t nbytes : {std::size_t{1}, kHeaderBytes - 1, kHeaderBytes}) {
    Ports ports(2);
    std::optional<Puppet> peer;
    auto puppet =
        std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
    const auto ring = ports.join(0, test_options());
    puppet.get();
    Buffer buffer(1000);
    const Ticket ticket = ring->exchange({}, {{1, buffer.data(), buffer.size()}}, 0);
    const HeaderBytes bytes = encode(peer->data(0, 1000));
    write_all(peer->socket(1), bytes.data(), nbytes);
    peer->vanish();
    const Failure failure = failure_of([&] { ring->wait(ticket, 0); });
    CHECK(failure.origin == 1);
    CHECK(failure.kind == Kind::kTransport);
    CHECK(contains(failure.text, "receiving message 0 from rank 1"));
  }
}

TEST_CASE("a payload that was damaged on its way is found when checksums are on") {
  const Failure failure = failure_after(
      [](Puppet& peer) {
        Buffer payload = pattern(1000, 1);
        Header header = peer.data(0, 1000);
        header.flags = kChecksum;
        header.payload_crc = crc32c(payload.data(), payload.size());
        payload[500] ^= 4;
        peer.send(header, payload);
      },
      1, true);
  CHECK(failure.kind == Kind::kProtocol);
  CHECK(contains(failure.text, "a corrupted piece: lane 1, message 0, bytes 0 to 1000"));
}

TEST_CASE("pings are answered while the caller does nothing") {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet = std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
  const auto ring = ports.join(0, test_options());
  puppet.get();
  peer->send(peer->header(Type::kPing));
  auto header = peer->read(0);
  REQUIRE(header);
  CHECK(header->type == Type::kPong);
  CHECK(header->flags == 0);
  int word = 0;
  ring->exchange({}, {{1, &word, 4}}, 0);
  header = peer->read(0);
  REQUIRE(header);
  CHECK(header->type == Type::kReady);
  peer->send(peer->header(Type::kPing));
  header = peer->read(0);
  REQUIRE(header);
  CHECK(header->flags == kWaiting);
}

TEST_CASE("different secrets are an authentication error on both ranks") {
  Ports ports(2);
  in_parallel(2, [&](int rank) {
    const Failure failure = failure_of([&] {
      ports.join(rank, test_options(1, false, 1000), Bytes(32, static_cast<std::uint8_t>(rank)));
    });
    CHECK(failure.kind == Kind::kAuthentication);
    CHECK(failure.origin == 1 - rank);
    CHECK(contains(failure.text, "secret"));
  });
}

TEST_CASE("different options are named") {
  Ports ports(2);
  in_parallel(2, [&](int rank) {
    const Failure failure =
        failure_of([&] { ports.join(rank, test_options(1 + rank, false, 1000)); });
    if (rank == 0) CHECK(contains(failure.text, "it has 2 lanes, this rank 1"));
  });
}

TEST_CASE("strangers on the port neither harm the ring nor get an answer") {
  Ports ports(3);
  // Silent ones first, more than may be pending at once; then some that talk.
  std::vector<Socket> strangers;
  const auto connect_strangers = [&](int count) {
    for (int i = 0; i < count; ++i) strangers.push_back(connect_to(ports.addresses[0]));
  };
  connect_strangers(60);
  auto more = std::async(std::launch::async, [&] { connect_strangers(40); });
  std::unique_ptr<Transport> rings[3];
  const auto start = std::chrono::steady_clock::now();
  in_parallel(3, [&](int rank) { rings[rank] = ports.join(rank, test_options()); });
  // Well before the handshakes of the silent ones are given up, which takes five seconds.
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(3));
  more.get();

  std::mt19937 random(5);
  Terms other{test_ring_id(), 3, 1, false};
  other.ring_id[0] ^= 1;
  for (int i = 0; i < 20; ++i) {
    Socket stranger = connect_to(ports.addresses[0]);
    Buffer words = i % 2 ? encode_hello(other, {2, 0, 1}, make_nonce()) : Buffer(kHelloBytes);
    if (i % 2 == 0) {
      for (auto& byte : words) byte = static_cast<std::uint8_t>(random());
    }
    write_all(stranger, words.data(), words.size());
    std::uint8_t answer;
    CHECK_FALSE(read_all(stranger, &answer, 1));
  }
  CHECK(rings[0]->stats().rejected_connections >= 20);
  in_parallel(3, [&](int rank) {
    const int next = (rank + 1) % 3, prev = (rank + 2) % 3;
    Buffer out = pattern(100000, rank), in(100000);
    rings[rank]->wait(
        rings[rank]->exchange({{next, out.data(), out.size()}}, {{prev, in.data(), in.size()}}, 0),
        0);
    CHECK(in == pattern(100000, prev));
  });
}

TEST_CASE("a place that is taken is not given twice, even to one who knows the secret") {
  Ports ports(2);
  std::optional<Puppet> peer;
  auto puppet = std::async(std::launch::async, [&] { peer.emplace(ports.addresses[0], 1, 0, 2); });
  const auto ring = ports.join(0, test_options());
  puppet.get();
  Socket second = connect_to(ports.addresses[0]);
  const Secret secret(test_secret());
  Bytes out;
  DialerHandshake handshake({test_ring_id(), 2, 1, false}, {1, 0, 1}, secret, out);
  write_all(second, out.data(), out.size());
  Bytes answer(kAnswerBytes);
  REQUIRE(read_all(second, answer.data(), answer.size()));
  out.clear();
  handshake.take(answer.data(), out);
  write_all(second, out.data(), out.size());
  // The welcome may be on its way, but the lane is not there.
  std::uint8_t rest[kWelcomeBytes + 1];
  CHECK_FALSE(read_all(second, rest, sizeof(rest)));
  peer->send(peer->header(Type::kPing));
  CHECK(peer->read(0));
}
