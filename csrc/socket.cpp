#include "socket.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <memory>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

// Dead peers without a FIN or RST: the first probe after 5 s of silence, then three, 2 s apart.
constexpr int kKeepIdleS = 5, kKeepIntervalS = 2, kKeepCount = 3;

// Small: handshakes are accepted as fast as the loop turns.
constexpr int kBacklog = 64;

void set_option(int fd, int level, int name, int value) {
  ::setsockopt(fd, level, name, &value, sizeof(value));
}

std::string host_text(const sockaddr* address, socklen_t size) {
  char host[NI_MAXHOST];
  if (::getnameinfo(address, size, host, sizeof(host), nullptr, 0, NI_NUMERICHOST) != 0) return "?";
  return host;
}

}  // namespace

// ---- Address

Address Address::of_host(const std::string& host) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const bool has_nul = host.find('\0') != std::string::npos;
  const bool ok =
      !host.empty() && !has_nul && ::getaddrinfo(host.c_str(), nullptr, &hints, &found) == 0;
  check(ok, "host", "a numeric IPv4 or IPv6 address", concat("'", host, "'"));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
  Address address;
  std::memcpy(&address.storage_, found->ai_addr, found->ai_addrlen);
  address.size_ = found->ai_addrlen;
  return address;
}

Address Address::parse(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  const std::string port = colon == std::string::npos ? "" : text.substr(colon + 1);
  std::string host = text.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  const bool digits =
      !port.empty() && port.size() <= 5 &&
      std::all_of(port.begin(), port.end(), [](char c) { return c >= '0' && c <= '9'; });
  const int number = digits ? std::stoi(port) : 0;
  const bool ok =
      number >= 1 && number <= 65535 && bracketed == (host.find(':') != std::string::npos);
  check(ok, "address", "host:port or [IPv6 host]:port", concat("'", text, "'"));
  Address address = of_host(host);
  auto* storage = &address.storage_;
  if (address.family() == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(storage)->sin6_port = htons(static_cast<std::uint16_t>(number));
  } else {
    reinterpret_cast<sockaddr_in*>(storage)->sin_port = htons(static_cast<std::uint16_t>(number));
  }
  return address;
}

Address Address::local(int fd) {
  Address address;
  address.size_ = sizeof(address.storage_);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage_), &address.size_);
  return address;
}

Address Address::remote(int fd) {
  Address address;
  address.size_ = sizeof(address.storage_);
  ::getpeername(fd, reinterpret_cast<sockaddr*>(&address.storage_), &address.size_);
  return address;
}

bool Address::is_any() const {
  if (family() == AF_INET6) {
    const auto& host = reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_addr;
    const auto* bytes = host.s6_addr;
    const bool mapped = IN6_IS_ADDR_V4MAPPED(&host);
    return std::all_of(bytes + (mapped ? 12 : 0), bytes + 16, [](auto byte) { return byte == 0; });
  }
  return reinterpret_cast<const sockaddr_in*>(&storage_)->sin_addr.s_addr == htonl(INADDR_ANY);
}

bool Address::is_loopback() const {
  if (family() == AF_INET6) {
    return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_addr);
  }
  const auto host = reinterpret_cast<const sockaddr_in*>(&storage_)->sin_addr.s_addr;
  return family() == AF_INET && ntohl(host) >> 24 == 127;
}

bool Address::same_host(const Address& other) const {
  if (family() != other.family()) return false;
  return host_text(data(), size()) == host_text(other.data(), other.size());
}

std::string Address::text() const {
  const std::string host = host_text(data(), size());
  if (family() == AF_INET6) {
    const auto port = reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_port;
    return concat("[", host, "]:", ntohs(port));
  }
  return concat(host, ":", ntohs(reinterpret_cast<const sockaddr_in*>(&storage_)->sin_port));
}

// ---- Socket

Socket::Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void Socket::close() {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

Socket Socket::connect(const Address& address, int* error) {
  Socket socket(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  *error = 0;
  if (!socket.open()) {
    *error = errno;
  } else if (::connect(socket.fd(), address.data(), address.size()) != 0 && errno != EINPROGRESS) {
    *error = errno;
  }
  return socket;
}

void Socket::tune(std::chrono::milliseconds unacked) {
  set_option(fd_, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd_, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd_, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleS);
  set_option(fd_, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalS);
  set_option(fd_, IPPROTO_TCP, TCP_KEEPCNT, kKeepCount);
  // Keepalive does not run while bytes are unacknowledged; this covers that time.
  const auto unacked_ms = std::min<std::int64_t>(unacked.count(), INT_MAX);
  set_option(fd_, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(unacked_ms));
  // BBR paces its packets, which on one host only costs time (about 1.8x). SO_SNDBUF and SO_RCVBUF
  // stay unset: setting them would turn the kernel's autotuning off.
  const Address here = Address::local(fd_);
  if (here.is_loopback() || here.same_host(Address::remote(fd_))) {
    ::setsockopt(fd_, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
  }
}

void Socket::set_low_water(std::size_t nbytes) {
  set_option(fd_, SOL_SOCKET, SO_RCVLOWAT, static_cast<int>(nbytes));
}

std::size_t Socket::receive_room() const {
  int nbytes = 0;
  socklen_t size = sizeof(nbytes);
  if (::getsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &nbytes, &size) != 0) return 0;
  return static_cast<std::size_t>(std::max(nbytes, 0));
}

int Socket::take_error() {
  int error = 0;
  socklen_t size = sizeof(error);
  if (::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
  return error;
}

ssize_t Socket::send(const iovec* parts, std::size_t count) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(parts);
  message.msg_iovlen = count;
  return ::sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t Socket::receive(const iovec* parts, std::size_t count) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(parts);
  message.msg_iovlen = count;
  return ::recvmsg(fd_, &message, MSG_DONTWAIT);
}

ssize_t Socket::send(const void* data, std::size_t nbytes) {
  return ::send(fd_, data, nbytes, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t Socket::receive(void* data, std::size_t nbytes) {
  return ::recv(fd_, data, nbytes, MSG_DONTWAIT);
}

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

// ---- Listener

Listener::Listener(const std::string& host) {
  const Address wanted = Address::of_host(host);
  check(!wanted.is_any(), "host", "the address of one interface", host);
  socket_ = Socket(::socket(wanted.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket_.open() || ::bind(socket_.fd(), wanted.data(), wanted.size()) != 0 ||
      ::listen(socket_.fd(), kBacklog) != 0) {
    throw UnsupportedError(
        concat("listening on ", host, ": ", system_words(errno),
               ". Give an address of this machine: ringkern doctor lists them."));
  }
  address_ = Address::local(socket_.fd()).text();
}

Listener Listener::take() {
  Listener taken;
  taken.socket_ = std::move(socket_);
  taken.address_ = address_;
  return taken;
}

Socket Listener::accept() {
  return Socket(::accept4(socket_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

std::vector<Interface> interfaces() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) {
    throw UnsupportedError(concat("listing the interfaces: ", system_words(errno), "."));
  }
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(list, &::freeifaddrs);
  std::vector<Interface> found;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    const socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    found.push_back({entry->ifa_name, host_text(entry->ifa_addr, size),
                     (entry->ifa_flags & IFF_UP) != 0, (entry->ifa_flags & IFF_LOOPBACK) != 0});
  }
  return found;
}

}  // namespace ringkern
