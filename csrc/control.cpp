#include "control.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "crc32c.h"
#include "error.h"
#include "link.h"

namespace ringkern {

Control::Control(Link& link, Loop& loop, Socket socket)
    : link_(link), socket_(std::move(socket)), watch_(loop, socket_.fd(), this) {
  update_watch();
}

void Control::on_events(std::uint32_t events) {
  constexpr std::uint32_t kBroken = EPOLLERR | EPOLLHUP;
  if (events & (EPOLLIN | kBroken)) read();
  if (events & (EPOLLOUT | kBroken)) flush();
}

void Control::update_watch() {
  std::uint32_t events = 0;
  if (!ended_) events |= EPOLLIN;
  if (!ended_ && !flushed()) events |= EPOLLOUT;
  watch_.set(events);
}

// ---- writing

void Control::queue(Header header, std::string_view payload) {
  header.nbytes = static_cast<std::uint32_t>(payload.size());
  header.payload_crc = crc32c(payload.data(), payload.size());
  const HeaderBytes bytes = encode(header);
  out_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  out_.append(payload);
}

void Control::flush() {
  while (!flushed()) {
    const ssize_t n = socket_.send(out_.data() + written_, out_.size() - written_);
    if (n < 0) {
      // Reading tells why, and the peer's last words may still be there to read.
      mute_ = !would_block(errno);
      break;
    }
    written_ += static_cast<std::size_t>(n);
  }
  if (flushed()) {
    out_.clear();
    written_ = 0;
  }
  update_watch();
}

// ---- reading

void Control::read() {
  const ssize_t n = socket_.receive(in_.data() + filled_, in_.size() - filled_);
  if (n == 0) return end("it closed the connection");
  if (n < 0) {
    if (!would_block(errno)) end(system_words(errno));
    return;
  }
  if (deaf_) return;
  filled_ += static_cast<std::size_t>(n);
  std::size_t taken = 0;
  while (const std::size_t frame = take_frame(in_.data() + taken, filled_ - taken)) {
    taken += frame;
    if (deaf_) break;  // that frame has ended the ring
  }
  filled_ = deaf_ ? 0 : filled_ - taken;
  std::memmove(in_.data(), in_.data() + taken, filled_);
}

// The size of the whole frame at the front, which the link has taken; 0 when there is none yet.
std::size_t Control::take_frame(const std::uint8_t* bytes, std::size_t nbytes) {
  if (nbytes < kHeaderBytes) return 0;
  HeaderBytes header_bytes;
  std::copy_n(bytes, kHeaderBytes, header_bytes.begin());
  const Header header = parse(header_bytes, link_.peer());
  link_.check_control(header);
  if (nbytes < kHeaderBytes + header.nbytes) return 0;
  const std::uint8_t* payload = bytes + kHeaderBytes;
  if (crc32c(payload, header.nbytes) != header.payload_crc) {
    throw ProtocolError(link_.peer(), concat("rank ", link_.peer(), " sent a corrupted text"));
  }
  link_.take_control(header, {reinterpret_cast<const char*>(payload), header.nbytes});
  return kHeaderBytes + header.nbytes;
}

void Control::end(const std::string& why) {
  ended_ = true;
  update_watch();
  if (!deaf_) link_.control_broke(why);
}

void Control::drain() {
  while (!ended_ && socket_.receive(in_.data(), in_.size()) > 0) {
  }
}

}  // namespace ringkern
