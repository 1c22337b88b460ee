// All that this rank has to do with one peer: a control socket, the data lanes, and the messages
// under way in both directions.

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "control.h"
#include "dial.h"
#include "frame.h"
#include "lane.h"
#include "messages.h"
#include "ring.h"

namespace ringkern {

// Used under the loop's mutex only, in the loop's thread or in a caller's. Errors are thrown, with
// the rank where they began; whoever catches them fails the ring.
class Link {
 public:
  Link(Ring& ring, int peer);
  ~Link();

  int peer() const { return peer_; }
  bool up() const { return up_; }

  // Begins to connect unless that has begun: the higher rank dials, the lower waits to be dialled.
  void connect();
  void connect(Ticket ticket);  // and finishes the ticket when the link is up
  bool is_free(int lane) const;
  void admit(int lane, Socket socket);

  // Throws what forbids posting so many messages; nothing is posted then.
  void check_post(std::size_t sends, std::size_t recvs) const;
  void post(const Send& send, Ticket ticket) { outbox_.post(send, ticket); }
  void post(const Recv& recv, Ticket ticket) { inbox_.post(recv, ticket); }
  // Moves at once what can be moved at once, up to the budget in bytes; the loop does the rest.
  void advance(std::size_t* budget);

  // For the deadlines.
  std::optional<Pending> oldest() const;  // the oldest unfinished message
  void ping(Clock::time_point unless_since);
  bool silent_since(Clock::time_point when) const;  // pinged before then, and no answer yet
  bool answered() const { return pinged_ && answered_; }
  bool peer_waits() const { return peer_waits_; }  // said so in its answer

  // Ends all traffic but what tells the peer why: no caller's buffer is touched any more. The
  // sockets stay open until the link goes, so that the peer reads the reason before the end.
  void stop();
  void tell(const Header& header, std::string_view text);
  void say_bye();
  bool flush();  // returns whether all has been written
  void drain();

  // What the lanes ask and report.
  bool next_piece(Piece* piece);
  void piece_written(std::uint64_t seq, std::size_t nbytes) { outbox_.piece_written(seq, nbytes); }
  bool place_piece(const Header& header, int lane, std::uint8_t** place);
  void piece_read(const Header& header) { inbox_.piece_read(header); }
  void lane_broke(const std::string& why);

  // What the control socket reports. check_control() sees a header before its payload is there.
  void check_control(const Header& header) const;
  void take_control(const Header& header, std::string_view text);
  void control_broke(const std::string& why);

 private:
  void dial(int lane);
  Header control_header(Type type) const;
  void check_route(const Header& header, int lane) const;
  void take_abort(const Header& header, std::string_view text);
  void check_left() const;
  bool lanes_ended() const;
  std::string trouble_connecting() const;
  [[noreturn]] void raise_gone() const;
  [[noreturn]] void raise_left() const;

  Ring& ring_;
  const int peer_;
  bool connecting_ = false;
  bool up_ = false;
  bool stopped_ = false;
  std::optional<Ticket> connect_ticket_;
  std::vector<std::unique_ptr<Dial>> dials_;  // by lane, 0 is control
  std::vector<Socket> sockets_;               // likewise, until all are there
  std::unique_ptr<Control> control_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  Outbox outbox_;
  Inbox inbox_;

  std::optional<Clock::time_point> pinged_;  // when the latest PING was sent
  bool answered_ = true;                     // it has its answer
  bool peer_waits_ = false;

  bool left_ = false;           // the peer has said goodbye,
  std::uint64_t promised_ = 0;  // having written so many messages in full
  bool control_ended_ = false;
  std::string trouble_;  // of the first socket that broke
  std::optional<Loop::Timer> grace_;
};

}  // namespace ringkern
