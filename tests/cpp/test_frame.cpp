#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <string>

#include "crc32c.h"
#include "error.h"
#include "frame.h"

using namespace ringkern;

namespace {

Header example() {
  Header header;
  header.type = Type::kData;
  header.flags = kChecksum;
  header.src = 3;
  header.dst = 70000;
  header.lane = 2;
  header.nbytes = kPieceBytes;
  header.seq = 0x0123456789abcdef;
  header.offset = 5 * kPieceBytes;
  header.total = std::uint64_t{1} << 40;
  header.payload_crc = 0xdeadbeef;
  return header;
}

void seal(HeaderBytes& bytes) { store_le(bytes.data() + 60, crc32c(bytes.data(), 60)); }

}  // namespace

TEST_CASE("a header survives the journey") {
  const Header in = example(), out = parse(encode(in), 3);
  CHECK(out.type == in.type);
  CHECK(out.flags == in.flags);
  CHECK(out.src == in.src);
  CHECK(out.dst == in.dst);
  CHECK(out.lane == in.lane);
  CHECK(out.nbytes == in.nbytes);
  CHECK(out.seq == in.seq);
  CHECK(out.offset == in.offset);
  CHECK(out.total == in.total);
  CHECK(out.payload_crc == in.payload_crc);
}

TEST_CASE("the bytes are little-endian, at the offsets of frame.h") {
  const HeaderBytes bytes = encode(example());
  CHECK(std::string(bytes.begin(), bytes.begin() + 4) == "RNGK");
  CHECK(bytes[4] == kVersion);
  CHECK(bytes[5] == 1);
  CHECK(bytes[8] == 3);
  CHECK(bytes[24] == 0xef);
  CHECK(bytes[31] == 0x01);
  CHECK(load_le<std::uint64_t>(&bytes[40]) == std::uint64_t{1} << 40);
}

TEST_CASE("every flipped bit is found") {
  const HeaderBytes good = encode(example());
  for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
    HeaderBytes bytes = good;
    bytes[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
    CHECK_THROWS_AS(parse(bytes, 3), ProtocolError);
  }
}

TEST_CASE("random bytes are refused, with and without a right checksum") {
  std::mt19937 random(2);
  int accepted = 0;
  for (int i = 0; i < 100000; ++i) {
    HeaderBytes bytes = encode(example());
    // Some random bytes everywhere, so that each of the checks is reached.
    for (int change = 0; change < 1 + i % 64; ++change) {
      bytes[random() % bytes.size()] = static_cast<std::uint8_t>(random());
    }
    if (i % 2) seal(bytes);
    try {
      const Header header = parse(bytes, 3);
      ++accepted;
      // What is accepted can be written by encode(), byte for byte.
      REQUIRE(encode(header) == bytes);
      REQUIRE(header.nbytes <= kPieceBytes);
    } catch (const ProtocolError& error) {
      REQUIRE(error.origin == 3);
    }
  }
  CHECK(accepted > 0);
}

TEST_CASE("a payload is at most what its type allows") {
  for (const auto& [type, most] :
       {std::pair{Type::kData, kPieceBytes}, std::pair{Type::kAbort, kTextBytes},
        std::pair{Type::kReady, std::size_t{0}}, std::pair{Type::kBye, std::size_t{0}},
        std::pair{Type::kPing, std::size_t{0}}, std::pair{Type::kPong, std::size_t{0}}}) {
    Header header;
    header.type = type;
    header.nbytes = static_cast<std::uint32_t>(most);
    CHECK_NOTHROW(parse(encode(header), 0));
    header.nbytes += 1;
    CHECK_THROWS_AS(parse(encode(header), 0), ProtocolError);
  }
}

TEST_CASE("text is cut at a character and made valid") {
  CHECK(clean_text("rank 1: \xc3\xa9t\xc3\xa9\n") == "rank 1: \xc3\xa9t\xc3\xa9\n");
  CHECK(clean_text("\xff\xfe.") == "??.");
  CHECK(clean_text("\xc3") == "?");                 // ends too early
  CHECK(clean_text("\xc0\xaf") == "??");            // longer than needed
  CHECK(clean_text("\xed\xa0\x80") == "???");       // a surrogate
  CHECK(clean_text("\xf4\x90\x80\x80") == "????");  // beyond U+10FFFF
  CHECK(clean_text(std::string("a\0b\x1b[", 5)) == "a?b?[");
  std::string longer;
  for (int i = 0; i < 3000; ++i) longer += "\xe2\x82\xac";
  CHECK(clean_text(longer).size() == kTextBytes - kTextBytes % 3);
  CHECK(clean_text(std::string(9999, 'x')).size() == kTextBytes);
}
