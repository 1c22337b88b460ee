#include "lane.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "crc32c.h"
#include "error.h"
#include "link.h"

namespace ringkern {
namespace {

// For how much of a piece the thread wakes, at the least and at the most.
constexpr std::size_t kLeastLowWater = std::size_t{32} << 10;
constexpr std::size_t kMostLowWater = std::size_t{256} << 10;

// And at most for this part of what the kernel holds, so that as much can always come: that counts
// what a packet takes beside its bytes, which is most of it for 1500 bytes in a page of 4096.
constexpr std::size_t kPartOfRoom = 4;

}  // namespace

Lane::Lane(Link& link, Loop& loop, Socket socket, int index)
    : link_(link),
      index_(index),
      socket_(std::move(socket)),
      watch_(loop, socket_.fd(), this),
      wanted_(kLeastLowWater) {
  update_watch();
}

void Lane::on_events(std::uint32_t events) {
  // As much as one piece per turn and direction: others wait for the mutex, and epoll will say
  // again what is still to be done. An error shows itself in the call that it makes fail.
  constexpr std::uint32_t kBroken = EPOLLERR | EPOLLHUP;
  std::size_t in_budget = kHeaderBytes + kPieceBytes, out_budget = in_budget;
  if (events & (EPOLLIN | kBroken)) pull(&in_budget);
  if (events & (EPOLLOUT | kBroken)) push(&out_budget);
}

void Lane::stop() {
  stopped_ = true;
  writing_ = in_payload_ = false;
  update_watch();
}

void Lane::update_watch() {
  std::uint32_t events = 0;
  if (!stopped_ && !ended_ && !paused_) events |= EPOLLIN;
  if (!stopped_ && !ended_ && !mute_ && writing_) events |= EPOLLOUT;
  watch_.set(events);
}

// ---- writing

bool Lane::load_piece() {
  if (!link_.next_piece(&out_)) return false;
  out_.header.lane = static_cast<std::uint32_t>(index_);
  out_done_ = 0;
  sealed_ = false;
  return true;
}

void Lane::push(std::size_t* budget) {
  while (!stopped_ && !ended_ && !mute_) {
    writing_ = writing_ || load_piece();
    const std::size_t left = kHeaderBytes + out_.header.nbytes - out_done_;
    if (!writing_ || left > *budget) break;
    const ssize_t n = write_piece();
    if (n < 0 && !would_block(errno)) {
      mute_ = true;
      link_.lane_broke(concat("writing: ", system_words(errno)));
    }
    if (n < 0) break;
    out_done_ += static_cast<std::size_t>(n);
    *budget -= static_cast<std::size_t>(n);
    if (static_cast<std::size_t>(n) < left) break;  // the socket is full
    writing_ = false;
    link_.piece_written(out_.header.seq, out_.header.nbytes);
  }
  update_watch();
}

// The checksum is made here, by the thread that writes: it takes longer than a caller may wait.
void Lane::seal_piece() {
  Header& header = out_.header;
  if (header.flags & kChecksum) header.payload_crc = crc32c(out_.data, header.nbytes);
  out_header_ = encode(header);
  sealed_ = true;
}

ssize_t Lane::write_piece() {
  if (!sealed_) seal_piece();
  std::array<iovec, 2> parts;
  std::size_t count = 0;
  if (out_done_ < kHeaderBytes) {
    parts[count++] = {out_header_.data() + out_done_, kHeaderBytes - out_done_};
  }
  const std::size_t sent = out_done_ - std::min(out_done_, kHeaderBytes);
  if (sent < out_.header.nbytes) {
    parts[count++] = {const_cast<std::uint8_t*>(out_.data) + sent, out_.header.nbytes - sent};
  }
  return socket_.send(parts.data(), count);
}

// ---- reading

void Lane::resume(std::size_t* budget) {
  if (!paused_ || stopped_) return;
  take_header();
  pull(budget);
}

void Lane::pull(std::size_t* budget) {
  while (*budget > 0 && !stopped_ && !ended_ && !paused_) {
    // The rest of this piece, and the header of the next with it.
    std::array<iovec, 2> parts;
    std::size_t count = 0, room = *budget;
    const auto add = [&](std::uint8_t* data, std::size_t nbytes) {
      nbytes = std::min(nbytes, room);
      if (nbytes > 0) parts[count++] = {data, nbytes};
      room -= nbytes;
    };
    if (in_payload_) add(in_data_ + in_done_, in_.nbytes - in_done_);
    add(in_header_.data() + in_header_done_, kHeaderBytes - in_header_done_);
    const ssize_t n = socket_.receive(parts.data(), count);
    if (n == 0) end("connection closed");
    if (n < 0 && !would_block(errno)) end(concat("reading: ", system_words(errno)));
    if (n <= 0) break;
    const bool emptied = static_cast<std::size_t>(n) < *budget - room;
    *budget -= static_cast<std::size_t>(n);
    adapt(static_cast<std::size_t>(n));
    take(static_cast<std::size_t>(n));
    if (emptied) break;
  }
  update_low_water();
  update_watch();
}

// Nobody needs a part of a piece, and on a slow link each packet would wake the thread, which takes
// a core from those who compute. Where hardly more has come than the thread woke for, bytes come
// slowly, and it may wake for more. Where much more has come, copying is what takes the time, and
// it should begin early.
void Lane::adapt(std::size_t came) {
  if (!in_payload_ || low_water_ != wanted_) return;
  wanted_ = came < wanted_ + wanted_ / 2 ? std::min(2 * wanted_, kMostLowWater)
                                         : std::max(wanted_ / 2, kLeastLowWater);
}

void Lane::update_low_water() {
  const std::size_t left = in_payload_ ? in_.nbytes - in_done_ : 1;
  const std::size_t most = std::max<std::size_t>(socket_.receive_room() / kPartOfRoom, 1);
  const std::size_t low_water = std::min({left, wanted_, most});
  if (low_water == low_water_) return;
  socket_.set_low_water(low_water);
  low_water_ = low_water;
}

void Lane::take(std::size_t nbytes) {
  if (in_payload_) {
    const std::size_t n = std::min(nbytes, in_.nbytes - in_done_);
    if (in_.flags & kChecksum) in_crc_ = crc32c(in_data_ + in_done_, n, in_crc_);
    in_done_ += n;
    nbytes -= n;
    if (in_done_ == in_.nbytes) finish_piece();
  }
  in_header_done_ += nbytes;
  if (in_header_done_ == kHeaderBytes) {
    in_ = parse(in_header_, link_.peer());
    take_header();
  }
}

// Finds the place of the piece that in_ announces, or pauses until there is one.
void Lane::take_header() {
  in_data_ = nullptr;
  paused_ = !link_.place_piece(in_, index_, &in_data_);
  if (paused_) return;
  in_header_done_ = in_done_ = 0;
  in_crc_ = 0;
  in_payload_ = in_.nbytes > 0;
  if (!in_payload_) finish_piece();
}

void Lane::finish_piece() {
  in_payload_ = false;
  if ((in_.flags & kChecksum) && in_crc_ != in_.payload_crc) {
    throw ProtocolError(
        link_.peer(),
        concat("rank ", link_.peer(), " sent a corrupted piece: lane ", index_, ", message ",
               in_.seq, ", bytes ", in_.offset, " to ", in_.offset + in_.nbytes, ", checksum ",
               in_crc_, " instead of ", in_.payload_crc));
  }
  link_.piece_read(in_);
}

void Lane::end(const std::string& why) {
  ended_ = true;
  const bool torn = in_payload_ || in_header_done_ > 0;
  link_.lane_broke(torn ? why + " in the middle of a frame" : why);
}

}  // namespace ringkern
