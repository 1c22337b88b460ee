// The messages under way between this rank and one peer: what goes out, what comes in.
//
// Messages are numbered per direction in the order posted. They are cut into pieces, and each lane
// takes the next piece when it has room, so that a slow flow delays only its own piece.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "frame.h"
#include "ring.h"
#include "transport.h"

namespace ringkern {

// Messages in one direction between two ranks that are posted and not finished. It bounds what a
// peer can make this rank remember.
constexpr std::size_t kMostPosted = 65536;

// A piece of a message that a lane is to write.
struct Piece {
  Header header;
  const std::uint8_t* data = nullptr;
};

// What an unfinished message is about, for the deadlines and the errors.
struct Pending {
  Ticket ticket;
  std::string doing;  // "receiving message 12 from rank 2 (10.0.0.2:29501): 4 of 16 bytes"
};

// A send is finished when all of its bytes are written and the peer has said that a receive of the
// same size is posted. The bytes do not wait for that word.
class Outbox {
 public:
  Outbox(Ring& ring, int peer) : ring_(ring), peer_(peer) {}

  void post(const Send& send, Ticket ticket);
  bool has_piece() const { return to_take_ < next(); }
  Piece take_piece();  // needs has_piece()
  void piece_written(std::uint64_t seq, std::size_t nbytes);
  void take_ready(std::uint64_t seq, std::uint64_t total);

  std::size_t size() const { return sends_.size(); }
  std::uint64_t written_in_full() const;
  std::optional<Pending> oldest() const;
  void clear() { sends_.clear(), to_take_ = next(); }

 private:
  struct Message {
    Ticket ticket;
    const std::uint8_t* data;
    std::size_t nbytes;
    std::size_t taken = 0;    // bytes that lanes have taken
    std::size_t written = 0;  // bytes that lanes have written
    bool whole = false;       // written to the end, which a message of no bytes has too
    bool ready = false;
  };

  std::uint64_t next() const { return first_ + sends_.size(); }
  void check_size(std::uint64_t seq, std::size_t nbytes, std::uint64_t total) const;
  void finish(Message& message);

  Ring& ring_;
  const int peer_;
  std::deque<Message> sends_;  // from message first_ on
  std::uint64_t first_ = 0;
  std::uint64_t to_take_ = 0;                // the first message with pieces to be taken
  std::uint64_t readies_ = 0;                // how many READYs have come; they come in order
  std::deque<std::uint64_t> early_readies_;  // sizes, from message next() on
};

// A receive is finished when all of its bytes are in the caller's memory.
class Inbox {
 public:
  Inbox(Ring& ring, int peer) : ring_(ring), peer_(peer) {}

  void post(const Recv& recv, Ticket ticket);
  // The receive whose READY is to be sent next, once each. Called before the lanes read on, so
  // that no receive is finished before it is announced.
  std::optional<Header> next_ready();
  // Where the piece belongs, or false when its receive is not posted yet. Throws ProtocolError for
  // a piece that cannot come next.
  bool place(const Header& header, std::uint8_t** place);
  void piece_read(const Header& header);

  std::size_t size() const { return recvs_.size(); }
  // Whether a receive is posted that is not among the peer's first `count` messages.
  bool expects_beyond(std::uint64_t count) const { return !recvs_.empty() && next() > count; }
  std::optional<Pending> oldest() const;
  void clear() { recvs_.clear(); }

 private:
  struct Message {
    Ticket ticket;
    std::uint8_t* data;
    std::size_t nbytes;
    std::size_t placed = 0;
    std::size_t read = 0;
    bool whole = false;
    std::vector<bool> seen;  // by piece; only with several lanes, where pieces overtake each other
  };

  std::uint64_t next() const { return first_ + recvs_.size(); }
  void check_next(const Header& header) const;
  [[noreturn]] void violation(const Header& header, const char* what) const;

  Ring& ring_;
  const int peer_;
  std::deque<Message> recvs_;  // from message first_ on
  std::uint64_t first_ = 0;
  std::uint64_t to_announce_ = 0;
};

}  // namespace ringkern
