// The control socket of a link: frames that must not wait behind data.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "frame.h"
#include "loop.h"
#include "socket.h"

namespace ringkern {

class Link;

// Used under the loop's mutex only, in the loop's thread or in a caller's.
class Control : private Handler {
 public:
  Control(Link& link, Loop& loop, Socket socket);

  // Queues a frame; flush() or the loop writes it. `out_` cannot grow without bound: the link
  // limits its READY frames, and answers one PING at a time.
  void queue(Header header, std::string_view payload = {});
  void flush();
  bool flushed() const { return written_ == out_.size() || mute_; }

  // After a failure: reads on, so that the peer's words are not lost to a reset, and ignores them.
  void stop_listening() { deaf_ = true; }

  // Nothing more will be read. Called before the socket closes: unread bytes would make the kernel
  // send a reset, which can overtake what was written last.
  void drain();

 private:
  void on_events(std::uint32_t events) override;
  void read();
  std::size_t take_frame(const std::uint8_t* bytes, std::size_t nbytes);
  void end(const std::string& why);
  void update_watch();

  Link& link_;
  Socket socket_;
  Watch watch_;
  std::string out_;
  std::size_t written_ = 0;
  std::array<std::uint8_t, 2 * (kHeaderBytes + kTextBytes)> in_;
  std::size_t filled_ = 0;
  bool mute_ = false;
  bool deaf_ = false;
  bool ended_ = false;
};

}  // namespace ringkern
