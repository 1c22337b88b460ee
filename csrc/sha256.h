// SHA-256 (FIPS 180-4) and HMAC (RFC 2104), for the handshake: a few hundred bytes per connection.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace ringkern {

using Digest = std::array<std::uint8_t, 32>;

class Sha256 {
 public:
  Sha256();
  ~Sha256();  // wipes its state, which may hold a key
  void update(const void* data, std::size_t nbytes);
  Digest finish();

 private:
  void compress(const std::uint8_t* block);

  std::array<std::uint32_t, 8> state_;
  std::array<std::uint8_t, 64> block_{};
  std::uint64_t nbytes_ = 0;
};

Digest sha256(const void* data, std::size_t nbytes);
Digest hmac_sha256(const void* key, std::size_t key_nbytes, const void* data, std::size_t nbytes);

// Compares in a time that does not depend on where the bytes differ.
bool equal_digests(const Digest& a, const std::uint8_t* b);

}  // namespace ringkern
