#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "crc32c.h"

using namespace ringkern;

TEST_CASE("the examples of RFC 3720, B.4") {
  std::vector<std::uint8_t> bytes(32, 0);
  CHECK(crc32c(bytes.data(), 32) == 0x8a9136aa);
  bytes.assign(32, 0xff);
  CHECK(crc32c(bytes.data(), 32) == 0x62a8ab43);
  for (std::uint8_t i = 0; i < 32; ++i) bytes[i] = i;
  CHECK(crc32c(bytes.data(), 32) == 0x46dd794e);
  for (std::uint8_t i = 0; i < 32; ++i) bytes[i] = static_cast<std::uint8_t>(31 - i);
  CHECK(crc32c(bytes.data(), 32) == 0x113fdb5c);
  CHECK(crc32c("123456789", 9) == 0xe3069283);
  CHECK(crc32c(nullptr, 0) == 0);
}

TEST_CASE("the instruction and the tables agree at every alignment and length") {
  std::mt19937 random(1);
  std::vector<std::uint8_t> bytes(10000);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
  for (std::size_t start = 0; start < 16; ++start) {
    for (std::size_t length = 0; length < 200; ++length) {
      REQUIRE(crc32c(&bytes[start], length) == crc32c_portable(&bytes[start], length));
    }
    // Around the stride of the interleaved streams.
    for (std::size_t length = 3000; length < 6300; length += 7) {
      REQUIRE(crc32c(&bytes[start], length) == crc32c_portable(&bytes[start], length));
    }
  }
}

TEST_CASE("parts can be taken one after the other") {
  std::vector<std::uint8_t> bytes(7000, 0x5a);
  const std::uint32_t whole = crc32c(bytes.data(), bytes.size());
  for (std::size_t cut = 0; cut <= bytes.size(); cut += 131) {
    const std::uint32_t first = crc32c(bytes.data(), cut);
    REQUIRE(crc32c(bytes.data() + cut, bytes.size() - cut, first) == whole);
  }
}
