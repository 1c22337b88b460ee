// What a message looks like on a link: a fixed header of 64 little-endian bytes, then `nbytes` of
// payload. Nothing here trusts a remote byte: parse() accepts only what encode() can have written.
//
//   offset  bytes  field               offset  bytes  field
//        0      4  magic                   24      8  seq
//        4      1  version                 32      8  offset
//        5      1  type                    40      8  total
//        6      2  flags                   48      4  payload_crc
//        8      4  src                     52      8  zero
//       12      4  dst                     60      4  CRC-32C of the 60 bytes before
//       16      4  lane
//       20      4  nbytes

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ringkern {

constexpr std::uint8_t kVersion = 1;
constexpr std::size_t kHeaderBytes = 64;

// A message travels in pieces of this size, and no system call moves more. Measured on loopback:
// 64 KiB calls lose 30 %, more than 1 MiB gains nothing; and the mutex is held for one call only.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

// How much text an ABORT may carry; longer reasons are cut.
constexpr std::size_t kTextBytes = 4096;

enum class Type : std::uint8_t {
  kData = 1,   // a piece: seq, offset, total; on a data lane, the others on the control lane
  kReady = 2,  // "my receive seq, of total bytes, is posted"
  kAbort = 3,  // seq = the rank where it began, offset = Kind, payload = the reason
  kBye = 4,    // "I leave; seq messages were written in full"
  kPing = 5,   // "are you there?"
  kPong = 6,   // "yes"; kWaiting when the rank itself waits for somebody
};

enum Flag : std::uint16_t {
  kChecksum = 1,  // payload_crc covers the payload
  kWaiting = 2,
};

struct Header {
  Type type = Type::kData;
  std::uint16_t flags = 0;
  std::uint32_t src = 0;
  std::uint32_t dst = 0;
  std::uint32_t lane = 0;  // 0 is the control socket
  std::uint32_t nbytes = 0;
  std::uint64_t seq = 0;
  std::uint64_t offset = 0;
  std::uint64_t total = 0;
  std::uint32_t payload_crc = 0;
};

using HeaderBytes = std::array<std::uint8_t, kHeaderBytes>;

HeaderBytes encode(const Header& header);

// What a header says, or throws ProtocolError with `peer` as the origin when it cannot have been
// written by encode(), or when its payload would be larger than its type allows. Whether it fits
// the link and the posted receives is for the link to check.
Header parse(const HeaderBytes& bytes, int peer);

// The text as valid UTF-8 of at most kTextBytes without control characters: fit for an ABORT, and
// for an exception when it came out of one.
std::string clean_text(std::string_view text);

// Little-endian fields, one byte at a time: right on any machine, whatever the alignment.
template <typename Int>
void store_le(std::uint8_t* p, Int value) {
  for (std::size_t i = 0; i < sizeof(Int); ++i) p[i] = static_cast<std::uint8_t>(value >> (8 * i));
}

template <typename Int>
Int load_le(const std::uint8_t* p) {
  Int value = 0;
  for (std::size_t i = 0; i < sizeof(Int); ++i) {
    value = static_cast<Int>(value | static_cast<Int>(p[i]) << (8 * i));
  }
  return value;
}

}  // namespace ringkern
