// A handshake under way on a socket: moves its few bytes as the socket allows.

#pragma once

#include <array>
#include <memory>

#include "handshake.h"
#include "socket.h"

namespace ringkern {

class Greeting {
 public:
  enum class Progress { kWaiting, kDone, kClosed };

  // `out` is what the handshake wants sent first.
  Greeting(std::unique_ptr<Handshake> handshake, Bytes out);

  // Reads and writes what is possible now. Throws what Handshake::take() throws. Reads no byte
  // beyond the handshake, so that the socket can be handed on when it is done.
  Progress advance(Socket& socket);
  bool wants_to_write() const { return sent_ < out_.size(); }
  const Handshake& handshake() const { return *handshake_; }

 private:
  const std::unique_ptr<Handshake> handshake_;
  Bytes out_;
  std::size_t sent_ = 0;
  std::array<std::uint8_t, kLongestPart> in_;
  std::size_t received_ = 0;
};

}  // namespace ringkern
