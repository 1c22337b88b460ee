// Who may talk. Before any frame, both ends of a connection prove that they know the ring's secret:
//
//   dialer   -> acceptor   hello: version, ring, ranks, lane, options, nonce_d
//   acceptor -> dialer     nonce_a, HMAC("ringkern acceptor" | transcript)
//   dialer   -> acceptor   HMAC("ringkern dialer" | transcript)
//   acceptor -> dialer     HMAC("ringkern welcome" | transcript): the lane is taken up
//
// transcript = hello | nonce_a. It binds version, ring id, world size, both ranks, the lane and
// both nonces, so that nothing can be replayed, reflected, or moved to another place in the ring.
// All sizes are fixed. The classes below are bytes in, bytes out; they know no sockets and no time.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sha256.h"

namespace ringkern {

using RingId = std::array<std::uint8_t, 16>;
using Nonce = std::array<std::uint8_t, 16>;
using Bytes = std::vector<std::uint8_t>;

// The ring's shared key. Wiped when it goes.
class Secret {
 public:
  static constexpr std::size_t kLeastBytes = 32;

  explicit Secret(Bytes key);
  Secret(const Secret&) = delete;
  Secret& operator=(const Secret&) = delete;
  ~Secret();
  Digest mac(const char* label, const Bytes& transcript) const;

 private:
  Bytes key_;
};

// What all connections of a ring agree on.
struct Terms {
  RingId ring_id{};
  int world_size = 0;
  int lanes = 1;
  bool checksum = false;
};

// Which of the ring's connections this is.
struct Place {
  int src = -1;  // the dialer's rank
  int dst = -1;  // the acceptor's rank
  int lane = 0;  // 0 is the control socket, 1 to Terms::lanes carry data
};

Nonce make_nonce();

constexpr std::size_t kHelloBytes = 56;
constexpr std::size_t kAnswerBytes = sizeof(Nonce) + sizeof(Digest);
constexpr std::size_t kProofBytes = sizeof(Digest);
constexpr std::size_t kWelcomeBytes = sizeof(Digest);
constexpr std::size_t kLongestPart = kHelloBytes;

Bytes encode_hello(const Terms& terms, const Place& place, const Nonce& nonce);

// One side of one handshake. Both take what the other side sent, in parts of exactly need() bytes,
// and append what is to be sent to `out`.
class Handshake {
 public:
  virtual ~Handshake() = default;

  std::size_t need() const { return need_; }  // 0: it is over, the other side is who it says
  // Throws AuthenticationError or ProtocolError when the connection must be dropped; nothing is
  // appended to `out` then.
  virtual void take(const std::uint8_t* part, Bytes& out) = 0;

 protected:
  std::size_t need_ = 0;
};

class DialerHandshake : public Handshake {
 public:
  // Appends the hello.
  DialerHandshake(const Terms& terms, const Place& place, const Secret& secret, Bytes& out,
                  const Nonce& nonce = make_nonce());
  void take(const std::uint8_t* part, Bytes& out) override;

 private:
  const Place place_;
  const Secret& secret_;
  Bytes transcript_;
};

class AcceptorHandshake : public Handshake {
 public:
  AcceptorHandshake(const Terms& terms, int rank, const Secret& secret,
                    const Nonce& nonce = make_nonce());
  void take(const std::uint8_t* part, Bytes& out) override;

  // Where the client says it belongs: a claim until need() is 0. src is -1 before a valid hello.
  const Place& place() const { return place_; }

 private:
  void take_hello(const std::uint8_t* hello, Bytes& out);

  const Terms terms_;
  const int rank_;
  const Secret& secret_;
  const Nonce nonce_;
  Place place_;
  Bytes transcript_;
};

}  // namespace ringkern
