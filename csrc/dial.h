// One outgoing connection: dials until somebody answers, then proves who this is.

#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "greeting.h"
#include "handshake.h"
#include "loop.h"
#include "socket.h"

namespace ringkern {

// Used under the loop's mutex only. It has no deadline of its own: its owner destroys it.
class Dial : private Handler {
 public:
  // `done` gets the authenticated socket, once; it may destroy the Dial. When the listener turns
  // out not to know the secret, AuthenticationError goes to the loop's on_error.
  Dial(Loop& loop, const Address& address, const Terms& terms, const Place& place,
       const Secret& secret, std::function<void(Socket)> done);
  ~Dial() override;

  // Why the latest attempt failed, in the system's words; "" before any has.
  const std::string& trouble() const { return trouble_; }

 private:
  void start();
  void retry(const std::string& why);
  void on_events(std::uint32_t events) override;

  Loop& loop_;
  const Address address_;
  const Terms terms_;
  const Place place_;
  const Secret& secret_;
  const std::function<void(Socket)> done_;
  Socket socket_;
  std::optional<Watch> watch_;
  std::optional<Greeting> greeting_;  // empty while the socket connects
  Loop::Timer timer_;                 // ends the attempt, or the pause between two
  std::chrono::milliseconds delay_;
  std::string trouble_;
};

}  // namespace ringkern
