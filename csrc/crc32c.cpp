#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace ringkern {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // bit-reversed 0x1edc6f41

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b]: what byte b contributes when k more bytes follow it. Eight tables take eight bytes
// per turn.
constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][b] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t b = 0; b < 256; ++b) {
      const std::uint32_t before = tables[k - 1][b];
      tables[k][b] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

#if defined(__x86_64__)
// Three streams hide the instruction's latency of three cycles. Their checksums are joined by
// moving the earlier one past the bytes of the later one, which is a product of polynomials.
constexpr std::size_t kStride = 1024;

// moves[k][b]: what byte k of a checksum, having the value b, becomes after kStride zero bytes.
using Moves = std::array<std::array<std::uint32_t, 256>, 4>;

Moves make_moves() {
  Moves moves{};
  for (std::size_t k = 0; k < 4; ++k) {
    for (std::uint32_t b = 0; b < 256; ++b) {
      std::uint32_t crc = b << (8 * k);
      for (std::size_t i = 0; i < kStride; ++i) crc = (crc >> 8) ^ kTables[0][crc & 0xff];
      moves[k][b] = crc;
    }
  }
  return moves;
}

std::uint32_t move(const Moves& moves, std::uint32_t crc) {
  return moves[0][crc & 0xff] ^ moves[1][crc >> 8 & 0xff] ^ moves[2][crc >> 16 & 0xff] ^
         moves[3][crc >> 24];
}

std::uint64_t load64(const std::uint8_t* p) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

__attribute__((target("sse4.2"))) std::uint32_t crc32c_sse42(const void* data, std::size_t nbytes,
                                                             std::uint32_t start) {
  static const Moves moves = make_moves();
  const auto* p = static_cast<const std::uint8_t*>(data);
  std::uint64_t crc = ~start;
  for (; nbytes >= 3 * kStride; nbytes -= 3 * kStride, p += 3 * kStride) {
    std::uint64_t second = 0, third = 0;
    for (std::size_t i = 0; i < kStride; i += 8) {
      crc = _mm_crc32_u64(crc, load64(p + i));
      second = _mm_crc32_u64(second, load64(p + kStride + i));
      third = _mm_crc32_u64(third, load64(p + 2 * kStride + i));
    }
    crc = move(moves, static_cast<std::uint32_t>(crc)) ^ second;
    crc = move(moves, static_cast<std::uint32_t>(crc)) ^ third;
  }
  for (; nbytes >= 8; nbytes -= 8, p += 8) crc = _mm_crc32_u64(crc, load64(p));
  auto rest = static_cast<std::uint32_t>(crc);
  for (; nbytes > 0; --nbytes, ++p) rest = _mm_crc32_u8(rest, *p);
  return ~rest;
}
#endif

}  // namespace

std::uint32_t crc32c_portable(const void* data, std::size_t nbytes, std::uint32_t start) {
  const auto* p = static_cast<const std::uint8_t*>(data);
  std::uint32_t crc = ~start;
  for (; nbytes >= 8; nbytes -= 8, p += 8) {
    const std::uint32_t low = crc ^ (p[0] | std::uint32_t{p[1]} << 8 | std::uint32_t{p[2]} << 16 |
                                     std::uint32_t{p[3]} << 24);
    crc = kTables[7][low & 0xff] ^ kTables[6][low >> 8 & 0xff] ^ kTables[5][low >> 16 & 0xff] ^
          kTables[4][low >> 24] ^ kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^
          kTables[0][p[7]];
  }
  for (; nbytes > 0; --nbytes, ++p) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xff];
  return ~crc;
}

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return crc32c_sse42(data, nbytes, crc);
#endif
  return crc32c_portable(data, nbytes, crc);
}

}  // namespace ringkern
