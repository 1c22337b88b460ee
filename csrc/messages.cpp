#include "messages.h"

#include <algorithm>

#include "error.h"

namespace ringkern {
namespace {

std::size_t pieces_of(std::size_t nbytes) {
  return std::max<std::size_t>(1, nbytes / kPieceBytes + (nbytes % kPieceBytes != 0));
}

// Both ends find a difference in size, each by itself. Both name the sender as the origin, so that
// all ranks agree.
[[noreturn]] void raise_sizes_differ(int sender, int receiver, std::uint64_t seq,
                                     std::uint64_t sent, std::uint64_t expected) {
  throw ProtocolError(
      sender, concat("message ", seq, " from rank ", sender, " to rank ", receiver, " has ", sent,
                     " bytes where it is sent and ", expected,
                     " bytes where it is received. The ranks must post the same sizes in "
                     "the same order"));
}

}  // namespace

// ---- Outbox

void Outbox::post(const Send& send, Ticket ticket) {
  const std::uint64_t seq = next();
  Message message{ticket, static_cast<const std::uint8_t*>(send.data), send.nbytes};
  if (!early_readies_.empty()) {
    check_size(seq, send.nbytes, early_readies_.front());
    early_readies_.pop_front();
    message.ready = true;
  }
  sends_.push_back(message);
}

Piece Outbox::take_piece() {
  Message& message = sends_[to_take_ - first_];
  Piece piece;
  piece.header.src = static_cast<std::uint32_t>(ring_.rank);
  piece.header.dst = static_cast<std::uint32_t>(peer_);
  piece.header.flags = ring_.terms.checksum ? kChecksum : 0;
  piece.header.seq = to_take_;
  piece.header.offset = message.taken;
  piece.header.total = message.nbytes;
  const std::size_t nbytes = std::min(kPieceBytes, message.nbytes - message.taken);
  piece.header.nbytes = static_cast<std::uint32_t>(nbytes);
  piece.data = message.data + message.taken;
  message.taken += nbytes;
  if (message.taken == message.nbytes) ++to_take_;
  return piece;
}

void Outbox::piece_written(std::uint64_t seq, std::size_t nbytes) {
  Message& message = sends_[seq - first_];
  message.written += nbytes;
  ring_.stats.bytes_sent[static_cast<std::size_t>(peer_)] += nbytes;
  if (message.written < message.nbytes) return;
  message.whole = true;
  ++ring_.stats.messages_sent;
  finish(message);
}

void Outbox::take_ready(std::uint64_t seq, std::uint64_t total) {
  if (seq != readies_ || early_readies_.size() == kMostPosted) {
    throw ProtocolError(peer_, concat("rank ", peer_, " announced receive ", seq, " where receive ",
                                      readies_, " must come"));
  }
  ++readies_;
  if (seq >= next()) {
    early_readies_.push_back(total);
    return;
  }
  Message& message = sends_[seq - first_];  // unready until now, so it is still there
  check_size(seq, message.nbytes, total);
  message.ready = true;
  finish(message);
}

void Outbox::check_size(std::uint64_t seq, std::size_t nbytes, std::uint64_t total) const {
  if (nbytes != total) raise_sizes_differ(ring_.rank, peer_, seq, nbytes, total);
}

void Outbox::finish(Message& message) {
  if (!message.whole || !message.ready) return;
  ring_.ledger.finish_one(message.ticket);
  while (!sends_.empty() && sends_.front().whole && sends_.front().ready) {
    sends_.pop_front();
    ++first_;
  }
}

std::uint64_t Outbox::written_in_full() const {
  const auto torn = std::find_if(sends_.begin(), sends_.end(),
                                 [](const Message& message) { return !message.whole; });
  return first_ + static_cast<std::uint64_t>(torn - sends_.begin());
}

std::optional<Pending> Outbox::oldest() const {
  for (std::size_t i = 0; i < sends_.size(); ++i) {
    const Message& message = sends_[i];
    if (message.whole && message.ready) continue;
    return Pending{message.ticket,
                   concat("sending message ", first_ + i, " to ", ring_.name(peer_), ": ",
                          message.written, " of ", message.nbytes, " bytes written",
                          message.ready ? "" : ", no receive posted there")};
  }
  return std::nullopt;
}

// ---- Inbox

void Inbox::post(const Recv& recv, Ticket ticket) {
  Message message;
  message.ticket = ticket;
  message.data = static_cast<std::uint8_t*>(recv.data);
  message.nbytes = recv.nbytes;
  if (ring_.terms.lanes > 1) message.seen.resize(pieces_of(recv.nbytes));
  recvs_.push_back(std::move(message));
}

std::optional<Header> Inbox::next_ready() {
  if (to_announce_ >= next()) return std::nullopt;
  Header header;
  header.type = Type::kReady;
  header.seq = to_announce_;
  header.total = recvs_[to_announce_ - first_].nbytes;
  ++to_announce_;
  return header;
}

bool Inbox::place(const Header& header, std::uint8_t** place) {
  check_next(header);
  if (header.seq >= next()) return false;
  Message& message = recvs_[header.seq - first_];
  if (header.total != message.nbytes) {
    raise_sizes_differ(peer_, ring_.rank, header.seq, header.total, message.nbytes);
  }
  if (message.whole) violation(header, "a message that is complete");
  if (!message.seen.empty()) {
    auto seen = message.seen[header.offset / kPieceBytes];
    if (seen) violation(header, "a piece that has come before");
    seen = true;
  }
  message.placed += header.nbytes;
  *place = message.data + header.offset;
  return true;
}

// Whether a header can come at all, before its receive is known.
void Inbox::check_next(const Header& header) const {
  const bool cut_right =
      header.offset % kPieceBytes == 0 &&
      (header.offset < header.total || (header.total == 0 && header.offset == 0)) &&
      header.nbytes == std::min<std::uint64_t>(kPieceBytes, header.total - header.offset);
  if (!cut_right) violation(header, "a piece that no message is cut into");
  if (header.flags != (ring_.terms.checksum ? kChecksum : 0)) {
    violation(header, "flags that this ring has not agreed on");
  }
  if (ring_.terms.lanes == 1) {
    // One lane keeps the order of everything.
    const std::uint64_t offset = recvs_.empty() ? 0 : recvs_.front().placed;
    if (header.seq != first_ || header.offset != offset) violation(header, "a piece out of order");
  } else if (header.seq < first_ || header.seq - first_ >= recvs_.size() + kMostPosted) {
    violation(header, "a message out of order");
  }
}

void Inbox::piece_read(const Header& header) {
  Message& message = recvs_[header.seq - first_];
  message.read += header.nbytes;
  ring_.stats.bytes_received[static_cast<std::size_t>(peer_)] += header.nbytes;
  if (message.read < message.nbytes) return;
  message.whole = true;
  ++ring_.stats.messages_received;
  ring_.ledger.finish_one(message.ticket);
  while (!recvs_.empty() && recvs_.front().whole) {
    recvs_.pop_front();
    ++first_;
  }
}

std::optional<Pending> Inbox::oldest() const {
  if (recvs_.empty()) return std::nullopt;
  const Message& message = recvs_.front();
  return Pending{message.ticket, concat("receiving message ", first_, " from ", ring_.name(peer_),
                                        ": ", message.read, " of ", message.nbytes, " bytes")};
}

void Inbox::violation(const Header& header, const char* what) const {
  throw ProtocolError(
      peer_, concat("rank ", peer_, " sent ", what, ": message ", header.seq, ", bytes ",
                    header.offset, " to ", header.offset + header.nbytes, " of ", header.total,
                    "; message ", first_, " must come next"));
}

}  // namespace ringkern
