// A whole ring in one process, a thread for each rank; and a peer made by hand, which knows the
// secret and may say whatever a test wants.

#pragma once

#include <doctest/doctest.h>
#include <poll.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"
#include "frame.h"
#include "handshake.h"
#include "socket.h"
#include "tcp.h"

namespace ringkern {

inline Bytes test_secret() { return Bytes(Secret::kLeastBytes, 0x42); }
inline RingId test_ring_id() {
  RingId id;
  id.fill(9);
  return id;
}

inline TcpOptions test_options(int lanes = 1, bool checksum = false, int timeout_ms = 20000) {
  TcpOptions options;
  options.timeout = std::chrono::milliseconds(timeout_ms);
  options.lanes = lanes;
  options.checksum = checksum;
  return options;
}

// Listeners whose addresses all ranks know, before any of them connects.
struct Ports {
  explicit Ports(int world_size, const char* host = "127.0.0.1") {
    for (int rank = 0; rank < world_size; ++rank) {
      listeners.emplace_back(host);
      addresses.push_back(listeners.back().address());
    }
  }
  std::unique_ptr<Transport> join(int rank, const TcpOptions& options,
                                  Bytes secret = test_secret()) {
    return make_tcp(std::move(listeners[static_cast<std::size_t>(rank)]), rank, addresses,
                    test_ring_id(), std::move(secret), options);
  }
  std::vector<Listener> listeners;
  std::vector<std::string> addresses;
};

// Runs each body on its own thread; raises the first exception when all have ended.
inline void in_parallel(std::size_t count, const std::function<void(int)>& body) {
  std::vector<std::future<void>> threads;
  for (std::size_t i = 0; i < count; ++i) {
    threads.push_back(std::async(std::launch::async, body, static_cast<int>(i)));
  }
  std::exception_ptr first;
  for (auto& thread : threads) {
    try {
      thread.get();
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
}

// Forms a ring, runs body(rank, transport) on all ranks, and lets them leave together.
inline void run_ranks(int world_size, const TcpOptions& options,
                      const std::function<void(int, Transport&)>& body) {
  Ports ports(world_size);
  std::vector<std::unique_ptr<Transport>> rings(static_cast<std::size_t>(world_size));
  in_parallel(rings.size(), [&](int rank) {
    auto& ring = rings[static_cast<std::size_t>(rank)];
    ring = ports.join(rank, options);
    body(rank, *ring);
  });
  in_parallel(rings.size(), [&](int rank) { rings[static_cast<std::size_t>(rank)]->close(); });
}

// The failure that an action ends with; fails the test when it ends well.
inline Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TimeoutError& error) {
    return {Kind::kTimeout, error.origin, error.what()};
  } catch (const AuthenticationError& error) {
    return {Kind::kAuthentication, error.origin, error.what()};
  } catch (const ProtocolError& error) {
    return {Kind::kProtocol, error.origin, error.what()};
  } catch (const TransportError& error) {
    return {Kind::kTransport, error.origin, error.what()};
  }
  FAIL("no failure");
  return {};
}

inline bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) MESSAGE("'" << part << "' is not in '" << text << "'");
  return found;
}

// Bytes that differ between ranks, messages and places.
inline std::vector<std::uint8_t> pattern(std::size_t nbytes, int seed) {
  std::vector<std::uint8_t> bytes(nbytes);
  auto state = static_cast<std::uint32_t>(seed) * 2654435761u + 1;
  for (auto& byte : bytes) {
    state = state * 1664525u + 1013904223u;
    byte = static_cast<std::uint8_t>(state >> 24);
  }
  return bytes;
}

// Waits until the socket can be read; fails the test after ten seconds.
inline void await_readable(const Socket& socket) {
  pollfd entry{socket.fd(), POLLIN, 0};
  if (::poll(&entry, 1, 10000) != 1) throw std::runtime_error("nothing to read");
}

// Reads exactly so many bytes; false when the stream ends before.
inline bool read_all(Socket& socket, void* data, std::size_t nbytes) {
  auto* bytes = static_cast<std::uint8_t*>(data);
  while (nbytes > 0) {
    await_readable(socket);
    const ssize_t n = socket.receive(bytes, nbytes);
    if (n == 0 || (n < 0 && !would_block(errno))) return false;
    if (n < 0) continue;
    bytes += n;
    nbytes -= static_cast<std::size_t>(n);
  }
  return true;
}

inline void write_all(Socket& socket, const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  while (nbytes > 0) {
    pollfd entry{socket.fd(), POLLOUT, 0};
    ::poll(&entry, 1, 10000);
    const ssize_t n = socket.send(bytes, nbytes);
    if (n < 0 && !would_block(errno)) throw std::runtime_error("the peer is gone");
    if (n < 0) continue;
    bytes += n;
    nbytes -= static_cast<std::size_t>(n);
  }
}

inline Socket connect_to(const std::string& address) {
  int error = 0;
  Socket socket = Socket::connect(Address::parse(address), &error);
  REQUIRE(error == 0);
  pollfd entry{socket.fd(), POLLOUT, 0};
  REQUIRE(::poll(&entry, 1, 10000) == 1);
  REQUIRE(socket.take_error() == 0);
  socket.tune(std::chrono::seconds(10));  // or Nagle's algorithm holds small writes back
  return socket;
}

// A rank made by hand: dials a lower rank and proves who it is, then does nothing by itself.
class Puppet {
 public:
  Puppet(const std::string& address, int src, int dst, int world_size, int lanes = 1,
         bool checksum = false)
      : src_(src), dst_(dst) {
    const Secret secret(test_secret());
    const Terms terms{test_ring_id(), world_size, lanes, checksum};
    for (int lane = 0; lane <= lanes; ++lane) {
      sockets_.push_back(connect_to(address));
      Bytes out;
      DialerHandshake handshake(terms, {src, dst, lane}, secret, out);
      write_all(sockets_.back(), out.data(), out.size());
      while (handshake.need() > 0) {
        Bytes in(handshake.need());
        REQUIRE(read_all(sockets_.back(), in.data(), in.size()));
        out.clear();
        handshake.take(in.data(), out);
        write_all(sockets_.back(), out.data(), out.size());
      }
    }
  }

  Header header(Type type, std::uint64_t seq = 0, std::uint64_t total = 0) const {
    Header header;
    header.type = type;
    header.src = static_cast<std::uint32_t>(src_);
    header.dst = static_cast<std::uint32_t>(dst_);
    header.seq = seq;
    header.total = total;
    return header;
  }
  // A whole message of one piece, on lane 1.
  Header data(std::uint64_t seq, std::size_t nbytes) const {
    Header it = header(Type::kData, seq, nbytes);
    it.lane = 1;
    it.nbytes = static_cast<std::uint32_t>(nbytes);
    return it;
  }
  void send(const Header& header, const std::vector<std::uint8_t>& payload = {}) {
    const HeaderBytes bytes = encode(header);
    Socket& socket = sockets_[header.type == Type::kData ? header.lane : 0];
    write_all(socket, bytes.data(), bytes.size());
    write_all(socket, payload.data(), payload.size());
  }
  // The next frame, or none when the stream has ended.
  std::optional<Header> read(int lane, std::vector<std::uint8_t>* payload = nullptr) {
    HeaderBytes bytes;
    Socket& socket = sockets_[static_cast<std::size_t>(lane)];
    if (!read_all(socket, bytes.data(), bytes.size())) return std::nullopt;
    const Header header = parse(bytes, dst_);
    std::vector<std::uint8_t> body(header.nbytes);
    if (!read_all(socket, body.data(), body.size())) return std::nullopt;
    if (payload) *payload = std::move(body);
    return header;
  }
  Socket& socket(int lane) { return sockets_[static_cast<std::size_t>(lane)]; }
  void vanish() { sockets_.clear(); }

 private:
  const int src_, dst_;
  std::vector<Socket> sockets_;  // by lane, 0 is control
};

}  // namespace ringkern
