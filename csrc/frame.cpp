#include "frame.h"

#include <algorithm>

#include "crc32c.h"
#include "error.h"

namespace ringkern {
namespace {

constexpr std::uint32_t kMagic = 0x4b474e52;  // "RNGK"
constexpr std::size_t kCrcAt = kHeaderBytes - 4;

std::size_t most_payload(Type type) {
  switch (type) {
    case Type::kData:
      return kPieceBytes;
    case Type::kAbort:
      return kTextBytes;
    default:
      return 0;
  }
}

// How many bytes the UTF-8 character at the front of the text has; 0 when it is not valid.
std::size_t utf8_length(std::string_view text) {
  const auto at = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const std::uint8_t lead = at(0);
  std::size_t length = 0;
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) length = 2;
  if (lead >= 0xe0 && lead <= 0xef) length = 3;
  if (lead >= 0xf0 && lead <= 0xf4) length = 4;
  if (length == 0 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xc0) != 0x80) return 0;
  }
  // Longer than needed, a surrogate, or beyond U+10FFFF.
  if (lead == 0xe0 && at(1) < 0xa0) return 0;
  if (lead == 0xed && at(1) > 0x9f) return 0;
  if (lead == 0xf0 && at(1) < 0x90) return 0;
  if (lead == 0xf4 && at(1) > 0x8f) return 0;
  return length;
}

}  // namespace

HeaderBytes encode(const Header& header) {
  HeaderBytes bytes{};
  std::uint8_t* p = bytes.data();
  store_le(p + 0, kMagic);
  store_le(p + 4, kVersion);
  store_le(p + 5, static_cast<std::uint8_t>(header.type));
  store_le(p + 6, header.flags);
  store_le(p + 8, header.src);
  store_le(p + 12, header.dst);
  store_le(p + 16, header.lane);
  store_le(p + 20, header.nbytes);
  store_le(p + 24, header.seq);
  store_le(p + 32, header.offset);
  store_le(p + 40, header.total);
  store_le(p + 48, header.payload_crc);
  store_le(p + kCrcAt, crc32c(p, kCrcAt));
  return bytes;
}

Header parse(const HeaderBytes& bytes, int peer) {
  const std::uint8_t* p = bytes.data();
  const auto refuse = [&](const auto&... why) {
    throw ProtocolError(peer, concat("rank ", peer, " sent a frame header with ", why...));
  };
  if (load_le<std::uint32_t>(p) != kMagic) refuse("a wrong magic number");
  if (load_le<std::uint32_t>(p + kCrcAt) != crc32c(p, kCrcAt)) refuse("a wrong checksum");
  if (p[4] != kVersion) refuse("version ", int{p[4]}, ", this is version ", int{kVersion});
  if (p[5] < 1 || p[5] > static_cast<int>(Type::kPong)) refuse("the unknown type ", int{p[5]});
  if (load_le<std::uint64_t>(p + 52) != 0) refuse("bytes where zeros belong");

  Header header;
  header.type = static_cast<Type>(p[5]);
  header.flags = load_le<std::uint16_t>(p + 6);
  header.src = load_le<std::uint32_t>(p + 8);
  header.dst = load_le<std::uint32_t>(p + 12);
  header.lane = load_le<std::uint32_t>(p + 16);
  header.nbytes = load_le<std::uint32_t>(p + 20);
  header.seq = load_le<std::uint64_t>(p + 24);
  header.offset = load_le<std::uint64_t>(p + 32);
  header.total = load_le<std::uint64_t>(p + 40);
  header.payload_crc = load_le<std::uint32_t>(p + 48);
  if (header.flags > (kChecksum | kWaiting)) refuse("the unknown flags ", header.flags);
  if (header.nbytes > most_payload(header.type)) refuse("a payload of ", header.nbytes, " bytes");
  return header;
}

std::string clean_text(std::string_view text) {
  std::string clean;
  clean.reserve(std::min(text.size(), kTextBytes));
  while (!text.empty()) {
    std::size_t length = utf8_length(text);
    const bool keep = length > 0 && (static_cast<std::uint8_t>(text[0]) >= 0x20 || text[0] == '\n');
    length = std::max<std::size_t>(length, 1);
    if (clean.size() + length > kTextBytes) break;
    clean.append(keep ? text.substr(0, length) : std::string_view("?"));
    text.remove_prefix(length);
  }
  return clean;
}

}  // namespace ringkern
