// A non-blocking TCP socket, a numeric address, a listener. The only file that knows the kernel's
// socket options.

#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

namespace ringkern {

// A numeric IPv4 or IPv6 address with a port, written "host:port" or "[host]:port". Names are
// refused: resolving them would block, and the rendezvous publishes numbers.
class Address {
 public:
  Address() = default;
  static Address parse(const std::string& text);
  static Address of_host(const std::string& host);  // port 0
  static Address local(int fd);
  static Address remote(int fd);

  const sockaddr* data() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  socklen_t size() const { return size_; }
  int family() const { return storage_.ss_family; }
  bool is_any() const;
  bool is_loopback() const;
  bool same_host(const Address& other) const;
  std::string text() const;

 private:
  sockaddr_storage storage_{};
  socklen_t size_ = 0;
};

// Owns a file descriptor. All of its calls return at once.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;
  ~Socket() { close(); }

  // Begins to connect; `error` is 0 when that is under way, else an errno value.
  static Socket connect(const Address& address, int* error);

  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  void close();

  // Sets the options that a link needs, once connected; `unacked` is how long the peer's host may
  // take none of what was written. Best effort: a kernel that lacks an option still moves bytes.
  void tune(std::chrono::milliseconds unacked);

  // From now on the socket is readable when so many bytes are there, or no more can come. Best
  // effort, like tune().
  void set_low_water(std::size_t nbytes);
  // How many bytes the kernel holds until they are read, and what it needs beside them; it lets
  // that grow. 0 where it does not say.
  std::size_t receive_room() const;

  // The error that a non-blocking connect ended with; 0 when it is connected.
  int take_error();

  // Bytes moved, or -1 with errno set; receive() returns 0 at the end of the stream.
  ssize_t send(const iovec* parts, std::size_t count);
  ssize_t receive(const iovec* parts, std::size_t count);
  ssize_t send(const void* data, std::size_t nbytes);
  ssize_t receive(void* data, std::size_t nbytes);

 private:
  int fd_ = -1;
};

// True when errno says "not now" rather than "never".
bool would_block(int error);

// Accepts connections on one numeric address and an ephemeral port. Bound and listening as soon as
// it exists, so that its address may be published.
class Listener {
 public:
  explicit Listener(const std::string& host);

  const std::string& address() const { return address_; }
  int fd() const { return socket_.fd(); }
  void close() { socket_.close(); }

  // Hands the socket over; the address stays to be read.
  Listener take();

  // The next connection, or a socket that is not open, with errno set.
  Socket accept();

 private:
  Listener() = default;

  Socket socket_;
  std::string address_;
};

struct Interface {
  std::string name;
  std::string address;  // numeric, without a port
  bool is_up;
  bool is_loopback;
};

// This machine's interfaces, one entry for each IPv4 and IPv6 address.
std::vector<Interface> interfaces();

}  // namespace ringkern
