#include "sha256.h"

#include <string.h>

#include <algorithm>
#include <cstring>

namespace ringkern {
namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotr(std::uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

std::uint32_t load_be32(const std::uint8_t* p) {
  return std::uint32_t{p[0]} << 24 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 8 | p[3];
}

void store_be32(std::uint8_t* p, std::uint32_t x) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<std::uint8_t>(x >> (24 - 8 * i));
}

}  // namespace

Sha256::Sha256()
    : state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19} {}

Sha256::~Sha256() {
  explicit_bzero(state_.data(), sizeof(state_));
  explicit_bzero(block_.data(), sizeof(block_));
}

void Sha256::compress(const std::uint8_t* block) {
  std::uint32_t w[64];
  for (int t = 0; t < 16; ++t) w[t] = load_be32(block + 4 * t);
  for (int t = 16; t < 64; ++t) {
    const std::uint32_t s0 = rotr(w[t - 15], 7) ^ rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
    const std::uint32_t s1 = rotr(w[t - 2], 17) ^ rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (int t = 0; t < 64; ++t) {
    const std::uint32_t s1 = rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25);
    const std::uint32_t choose = (e & f) ^ (~e & g);
    const std::uint32_t t1 = h + s1 + choose + kRound[t] + w[t];
    const std::uint32_t s0 = rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22);
    const std::uint32_t majority = (a & b) ^ (a & c) ^ (b & c);
    h = g, g = f, f = e, e = d + t1;
    d = c, c = b, b = a, a = t1 + s0 + majority;
  }
  const std::uint32_t mixed[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state_[i] += mixed[i];
  explicit_bzero(w, sizeof(w));
}

void Sha256::update(const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  while (nbytes > 0) {
    const std::size_t filled = nbytes_ % block_.size();
    const std::size_t n = std::min(nbytes, block_.size() - filled);
    std::memcpy(block_.data() + filled, bytes, n);
    nbytes_ += n;
    bytes += n;
    nbytes -= n;
    if (nbytes_ % block_.size() == 0) compress(block_.data());
  }
}

Digest Sha256::finish() {
  const std::uint64_t nbits = nbytes_ * 8;
  const std::uint8_t one = 0x80, zero = 0;
  update(&one, 1);
  while (nbytes_ % block_.size() != block_.size() - 8) update(&zero, 1);
  std::uint8_t length[8];
  store_be32(length, static_cast<std::uint32_t>(nbits >> 32));
  store_be32(length + 4, static_cast<std::uint32_t>(nbits));
  update(length, sizeof(length));
  Digest digest;
  for (int i = 0; i < 8; ++i) store_be32(digest.data() + 4 * i, state_[i]);
  return digest;
}

Digest sha256(const void* data, std::size_t nbytes) {
  Sha256 hash;
  hash.update(data, nbytes);
  return hash.finish();
}

Digest hmac_sha256(const void* key, std::size_t key_nbytes, const void* data, std::size_t nbytes) {
  std::array<std::uint8_t, 64> inner{}, outer;
  if (key_nbytes > inner.size()) {
    const Digest short_key = sha256(key, key_nbytes);
    std::copy(short_key.begin(), short_key.end(), inner.begin());
  } else if (key_nbytes > 0) {
    std::memcpy(inner.data(), key, key_nbytes);
  }
  outer = inner;
  for (auto& byte : inner) byte ^= 0x36;
  for (auto& byte : outer) byte ^= 0x5c;

  Sha256 first, second;
  first.update(inner.data(), inner.size());
  first.update(data, nbytes);
  const Digest digest = first.finish();
  second.update(outer.data(), outer.size());
  second.update(digest.data(), digest.size());
  explicit_bzero(inner.data(), inner.size());
  explicit_bzero(outer.data(), outer.size());
  return second.finish();
}

bool equal_digests(const Digest& a, const std::uint8_t* b) {
  // volatile: the compiler may not leave the loop at the first difference.
  volatile std::uint8_t difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference = difference | (a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace ringkern
