#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdint>
#include <memory>
#include <random>

#include "error.h"
#include "handshake.h"

using namespace ringkern;

namespace {

Bytes key(std::uint8_t seed = 1) { return Bytes(Secret::kLeastBytes, seed); }

Terms terms() {
  Terms terms;
  terms.ring_id.fill(7);
  terms.world_size = 4;
  terms.lanes = 2;
  return terms;
}

const Place kPlace{3, 1, 2};

// Both ends, and the bytes between them.
struct Pair {
  explicit Pair(const Terms& dialer_terms = terms(), const Place& place = kPlace,
                std::uint8_t dialer_key = 1)
      : dialer_secret(key(dialer_key)), dialer(dialer_terms, place, dialer_secret, to_acceptor) {}

  // Takes all that is under way to the acceptor, and returns what it answers.
  void to_the_acceptor() { move(to_acceptor, acceptor, to_dialer); }
  void to_the_dialer() { move(to_dialer, dialer, to_acceptor); }
  static void move(Bytes& from, Handshake& side, Bytes& answer) {
    REQUIRE(from.size() == side.need());
    const Bytes part = std::move(from);
    from.clear();
    side.take(part.data(), answer);
  }

  Secret dialer_secret;
  Secret acceptor_secret{key()};
  Bytes to_acceptor, to_dialer;
  DialerHandshake dialer;
  AcceptorHandshake acceptor{terms(), 1, acceptor_secret};
};

}  // namespace

TEST_CASE("two ranks that know the secret find each other") {
  Pair pair;
  CHECK(pair.acceptor.place().src == -1);
  pair.to_the_acceptor();
  pair.to_the_dialer();
  CHECK(pair.acceptor.need() == kProofBytes);
  pair.to_the_acceptor();
  CHECK(pair.acceptor.need() == 0);
  CHECK(pair.dialer.need() == kWelcomeBytes);
  pair.to_the_dialer();
  CHECK(pair.dialer.need() == 0);
  CHECK(pair.acceptor.place().src == 3);
  CHECK(pair.acceptor.place().lane == 2);
}

TEST_CASE("a short secret is refused") { CHECK_THROWS_AS(Secret(Bytes(31)), ArgumentError); }

TEST_CASE("the dialer notices that the secrets differ before it proves anything") {
  Pair pair(terms(), kPlace, 2);
  pair.to_the_acceptor();
  CHECK_THROWS_AS(pair.to_the_dialer(), AuthenticationError);
  CHECK(pair.to_acceptor.empty());
}

TEST_CASE("the acceptor notices a wrong proof") {
  Pair pair;
  pair.to_the_acceptor();
  pair.to_the_dialer();
  pair.to_acceptor[5] ^= 1;
  CHECK_THROWS_AS(pair.to_the_acceptor(), AuthenticationError);
  CHECK(pair.to_dialer.empty());
}

TEST_CASE("a hello that does not fit gets no byte of answer") {
  Terms other = terms();
  Place place = kPlace;
  SUBCASE("another ring") { other.ring_id[15] ^= 1; }
  SUBCASE("another world size") { other.world_size = 5; }
  SUBCASE("other lanes") { other.lanes = 3; }
  SUBCASE("other checksums") { other.checksum = true; }
  SUBCASE("meant for another rank") { place.dst = 0; }
  SUBCASE("from this rank itself") { place.src = 1; }
  SUBCASE("from a rank that must be dialled") { place.src = 0; }
  SUBCASE("from no rank") { place.src = 4; }
  SUBCASE("for no lane") { place.lane = 3; }
  Pair pair(other, place);
  CHECK_THROWS_AS(pair.to_the_acceptor(), ProtocolError);
  CHECK(pair.to_dialer.empty());
}

TEST_CASE("a hello of another version or protocol is refused") {
  Pair pair;
  SUBCASE("version") { pair.to_acceptor[4] += 1; }
  SUBCASE("magic") { pair.to_acceptor[0] ^= 1; }
  CHECK_THROWS_AS(pair.to_the_acceptor(), ProtocolError);
  CHECK(pair.to_dialer.empty());
}

TEST_CASE("a recorded handshake opens no second connection") {
  Pair first;
  const Bytes hello = first.to_acceptor;
  first.to_the_acceptor();
  first.to_the_dialer();
  const Bytes proof = first.to_acceptor;
  first.to_the_acceptor();

  Secret secret(key());
  AcceptorHandshake acceptor(terms(), 1, secret);
  Bytes answer;
  acceptor.take(hello.data(), answer);
  CHECK_THROWS_AS(acceptor.take(proof.data(), answer), AuthenticationError);
}

TEST_CASE("the acceptor's own proof is not the dialer's") {
  Pair pair;
  pair.to_the_acceptor();
  const Bytes reflected(pair.to_dialer.begin() + sizeof(Nonce), pair.to_dialer.end());
  Bytes answer;
  CHECK_THROWS_AS(pair.acceptor.take(reflected.data(), answer), AuthenticationError);
}

TEST_CASE("a proof for one place does not open another") {
  // The same nonces and secret, so that only the place differs.
  const Nonce dialer_nonce{}, acceptor_nonce{};
  Secret secret(key());
  Bytes to_acceptor, to_dialer, proof, hello, answer;
  DialerHandshake dialer(terms(), {3, 1, 1}, secret, to_acceptor, dialer_nonce);
  AcceptorHandshake honest(terms(), 1, secret, acceptor_nonce);
  honest.take(to_acceptor.data(), to_dialer);
  dialer.take(to_dialer.data(), proof);

  DialerHandshake other(terms(), {3, 1, 2}, secret, hello, dialer_nonce);
  AcceptorHandshake acceptor(terms(), 1, secret, acceptor_nonce);
  acceptor.take(hello.data(), answer);
  CHECK_THROWS_AS(acceptor.take(proof.data(), answer), AuthenticationError);
}

TEST_CASE("random bytes never pass") {
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    Pair pair;
    if (i % 2) pair.to_the_acceptor(), pair.to_the_dialer();
    for (int change = 0; change <= i % 8; ++change) {
      auto& byte = pair.to_acceptor[random() % pair.to_acceptor.size()];
      byte = static_cast<std::uint8_t>(byte + 1 + random() % 255);
    }
    try {
      pair.to_the_acceptor();
      // Only the nonce and what the claim may be have changed; the proof will not fit the change.
      CHECK(pair.acceptor.need() == kProofBytes);
      if (pair.to_dialer.size() == kAnswerBytes) {
        CHECK_THROWS_AS(pair.to_the_dialer(), AuthenticationError);
      }
    } catch (const TransportError&) {
    }
    CHECK(pair.acceptor.need() != 0);
  }
}
