// One data socket of a link. It cuts nothing and matches nothing: the link tells it which piece to
// write next and where the piece that comes belongs.

#pragma once

#include <cstddef>
#include <cstdint>

#include "frame.h"
#include "loop.h"
#include "messages.h"
#include "socket.h"

namespace ringkern {

class Link;

// Used under the loop's mutex only, in the loop's thread or in a caller's.
class Lane : private Handler {
 public:
  Lane(Link& link, Loop& loop, Socket socket, int index);

  // Writes as many whole pieces as the budget and the socket allow; the loop writes the rest.
  void push(std::size_t* budget);
  // Reads on after a pause, when the piece that has come before its receive has a place now.
  void resume(std::size_t* budget);
  // Touches no caller's buffer any more. The socket stays open, so that the peer can still read.
  void stop();

  bool ended() const { return ended_; }  // nothing more can come

 private:
  void on_events(std::uint32_t events) override;
  bool load_piece();
  void seal_piece();
  ssize_t write_piece();
  void pull(std::size_t* budget);
  void take(std::size_t nbytes);
  void take_header();
  void finish_piece();
  void end(const std::string& why);
  void update_watch();
  void adapt(std::size_t came);
  void update_low_water();

  Link& link_;
  const int index_;
  Socket socket_;
  Watch watch_;

  // The piece that is being written.
  Piece out_;
  HeaderBytes out_header_;
  std::size_t out_done_ = 0;  // header included
  bool sealed_ = false;       // out_header_ is what out_ needs
  bool writing_ = false;

  // The piece that is being read.
  HeaderBytes in_header_;
  std::size_t in_header_done_ = 0;
  Header in_;
  std::uint8_t* in_data_ = nullptr;
  std::size_t in_done_ = 0;
  std::uint32_t in_crc_ = 0;
  bool in_payload_ = false;
  std::size_t low_water_ = 1;  // bytes that must have come for the loop to wake
  std::size_t wanted_;         // what that is where the piece is long enough

  bool paused_ = false;  // the next piece waits for its receive to be posted
  bool ended_ = false;
  bool stopped_ = false;
  bool mute_ = false;  // writing has failed; what has come may still be read
};

}  // namespace ringkern
