#include "handshake.h"

#include <string.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "error.h"
#include "frame.h"

namespace ringkern {
namespace {

constexpr std::uint32_t kMagic = 0x4f4c4c48;  // "HLLO"
constexpr const char* kAcceptorLabel = "ringkern acceptor";
constexpr const char* kDialerLabel = "ringkern dialer";
constexpr const char* kWelcomeLabel = "ringkern welcome";

void append(Bytes& out, const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  out.insert(out.end(), bytes, bytes + nbytes);
}

}  // namespace

Secret::Secret(Bytes key) : key_(std::move(key)) {
  check(key_.size() >= kLeastBytes, "secret", "at least 32 bytes", key_.size());
}

Secret::~Secret() { explicit_bzero(key_.data(), key_.size()); }

Digest Secret::mac(const char* label, const Bytes& transcript) const {
  Bytes message;
  append(message, label, ::strlen(label));
  append(message, transcript.data(), transcript.size());
  return hmac_sha256(key_.data(), key_.size(), message.data(), message.size());
}

Nonce make_nonce() {
  Nonce nonce;
  // Up to 256 bytes come whole or not at all, once the kernel's pool has been seeded.
  while (::getrandom(nonce.data(), nonce.size(), 0) != static_cast<ssize_t>(nonce.size())) {
    if (errno != EINTR) throw UnsupportedError(concat("getrandom: ", system_words(errno), "."));
  }
  return nonce;
}

Bytes encode_hello(const Terms& terms, const Place& place, const Nonce& nonce) {
  Bytes hello(kHelloBytes);
  std::uint8_t* p = hello.data();
  store_le<std::uint32_t>(p, kMagic);
  store_le<std::uint16_t>(p + 4, kVersion);
  store_le<std::uint16_t>(p + 6, terms.checksum ? kChecksum : 0);
  std::copy(terms.ring_id.begin(), terms.ring_id.end(), p + 8);
  store_le<std::uint32_t>(p + 24, static_cast<std::uint32_t>(terms.world_size));
  store_le<std::uint32_t>(p + 28, static_cast<std::uint32_t>(place.src));
  store_le<std::uint32_t>(p + 32, static_cast<std::uint32_t>(place.dst));
  store_le<std::uint16_t>(p + 36, static_cast<std::uint16_t>(place.lane));
  store_le<std::uint16_t>(p + 38, static_cast<std::uint16_t>(terms.lanes));
  std::copy(nonce.begin(), nonce.end(), p + 40);
  return hello;
}

// ---- the dialer

DialerHandshake::DialerHandshake(const Terms& terms, const Place& place, const Secret& secret,
                                 Bytes& out, const Nonce& nonce)
    : place_(place), secret_(secret), transcript_(encode_hello(terms, place, nonce)) {
  append(out, transcript_.data(), transcript_.size());
  need_ = kAnswerBytes;
}

void DialerHandshake::take(const std::uint8_t* part, Bytes& out) {
  const bool answer = need_ == kAnswerBytes;
  if (answer) append(transcript_, part, sizeof(Nonce));
  const std::uint8_t* proof = answer ? part + sizeof(Nonce) : part;
  if (!equal_digests(secret_.mac(answer ? kAcceptorLabel : kWelcomeLabel, transcript_), proof)) {
    throw AuthenticationError(
        place_.dst,
        concat("the listener at rank ", place_.dst,
               "'s address does not know this ring's secret. Either the ranks were given different "
               "secrets, or another program listens there"));
  }
  if (answer) {
    const Digest mine = secret_.mac(kDialerLabel, transcript_);
    append(out, mine.data(), mine.size());
  }
  need_ = answer ? kWelcomeBytes : 0;
}

// ---- the acceptor

AcceptorHandshake::AcceptorHandshake(const Terms& terms, int rank, const Secret& secret,
                                     const Nonce& nonce)
    : terms_(terms), rank_(rank), secret_(secret), nonce_(nonce) {
  need_ = kHelloBytes;
}

void AcceptorHandshake::take(const std::uint8_t* part, Bytes& out) {
  if (need_ == kHelloBytes) {
    take_hello(part, out);
    need_ = kProofBytes;
    return;
  }
  if (!equal_digests(secret_.mac(kDialerLabel, transcript_), part)) {
    throw AuthenticationError(place_.src, "it does not know this ring's secret");
  }
  const Digest welcome = secret_.mac(kWelcomeLabel, transcript_);
  append(out, welcome.data(), welcome.size());
  need_ = 0;
}

// Answers only what can be a rank of this ring that dials this one. A stranger gets no byte.
void AcceptorHandshake::take_hello(const std::uint8_t* hello, Bytes& out) {
  const auto refuse = [&](const auto&... why) { throw ProtocolError(place_.src, concat(why...)); };
  const bool ours = load_le<std::uint32_t>(hello) == kMagic &&
                    std::equal(terms_.ring_id.begin(), terms_.ring_id.end(), hello + 8);
  if (!ours) refuse("it is no rank of this ring");
  const auto version = load_le<std::uint16_t>(hello + 4);
  if (version != kVersion) refuse("it speaks version ", version, ", this rank ", int{kVersion});
  const auto src = load_le<std::uint32_t>(hello + 28);
  const auto lane = load_le<std::uint16_t>(hello + 36);
  const bool possible =
      load_le<std::uint32_t>(hello + 24) == static_cast<unsigned>(terms_.world_size) &&
      load_le<std::uint32_t>(hello + 32) == static_cast<unsigned>(rank_) &&
      src > static_cast<unsigned>(rank_) && src < static_cast<unsigned>(terms_.world_size);
  if (!possible) refuse("its rank or world size is not one that dials this rank");
  place_ = {static_cast<int>(src), rank_, lane};
  const auto lanes = load_le<std::uint16_t>(hello + 38);
  if (lanes != terms_.lanes) refuse("it has ", lanes, " lanes, this rank ", terms_.lanes);
  if (lane > lanes) refuse("it asks for lane ", lane, " of ", lanes);
  const auto flags = load_le<std::uint16_t>(hello + 6);
  if (flags != (terms_.checksum ? kChecksum : 0)) refuse("only one of the two has checksums on");

  Nonce nonce;
  std::copy(hello + 40, hello + kHelloBytes, nonce.begin());
  // This rank's own idea of what the hello must be goes into the proof, not the bytes that came.
  transcript_ = encode_hello(terms_, place_, nonce);
  append(transcript_, nonce_.data(), nonce_.size());
  const Digest proof = secret_.mac(kAcceptorLabel, transcript_);
  append(out, nonce_.data(), nonce_.size());
  append(out, proof.data(), proof.size());
}

}  // namespace ringkern
