// CRC-32C (Castagnoli), as in iSCSI (RFC 3720): guards headers always, payloads on request.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ringkern {

// The checksum of bytes whose predecessors had the checksum `crc`; 0 to begin with.
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t crc = 0);

// The same without the CPU's instruction: the fallback, and the test's oracle.
std::uint32_t crc32c_portable(const void* data, std::size_t nbytes, std::uint32_t crc = 0);

}  // namespace ringkern
