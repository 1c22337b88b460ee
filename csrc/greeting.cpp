#include "greeting.h"

#include <cerrno>
#include <utility>

namespace ringkern {

Greeting::Greeting(std::unique_ptr<Handshake> handshake, Bytes out)
    : handshake_(std::move(handshake)), out_(std::move(out)) {}

Greeting::Progress Greeting::advance(Socket& socket) {
  for (;;) {
    while (wants_to_write()) {
      const ssize_t n = socket.send(out_.data() + sent_, out_.size() - sent_);
      if (n < 0) return would_block(errno) ? Progress::kWaiting : Progress::kClosed;
      sent_ += static_cast<std::size_t>(n);
    }
    const std::size_t need = handshake_->need();
    if (need == 0) return Progress::kDone;
    const ssize_t n = socket.receive(in_.data() + received_, need - received_);
    if (n == 0) return Progress::kClosed;
    if (n < 0) return would_block(errno) ? Progress::kWaiting : Progress::kClosed;
    received_ += static_cast<std::size_t>(n);
    if (received_ == need) {
      received_ = 0;
      handshake_->take(in_.data(), out_);
    }
  }
}

}  // namespace ringkern
