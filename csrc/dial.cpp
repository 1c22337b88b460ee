#include "dial.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

// A refused connection is tried again: the peer may be about to listen.
constexpr std::chrono::milliseconds kFirstDelay{2}, kLongestDelay{250};

// What one attempt may take. A listener that accepts and says nothing is tried again too.
constexpr std::chrono::seconds kAttempt{5};

}  // namespace

Dial::Dial(Loop& loop, const Address& address, const Terms& terms, const Place& place,
           const Secret& secret, std::function<void(Socket)> done)
    : loop_(loop),
      address_(address),
      terms_(terms),
      place_(place),
      secret_(secret),
      done_(std::move(done)),
      delay_(kFirstDelay) {
  start();
}

Dial::~Dial() { loop_.cancel(timer_); }

void Dial::start() {
  timer_ = loop_.at(Clock::now() + kAttempt, [this] { retry("no answer"); });
  int error = 0;
  socket_ = Socket::connect(address_, &error);
  if (error != 0) return retry(system_words(error));
  watch_.emplace(loop_, socket_.fd(), static_cast<Handler*>(this));
  watch_->set(EPOLLOUT);
}

void Dial::retry(const std::string& why) {
  trouble_ = why;
  greeting_.reset();
  watch_.reset();
  socket_.close();
  loop_.cancel(timer_);
  timer_ = loop_.at(Clock::now() + delay_, [this] { start(); });
  delay_ = std::min(2 * delay_, kLongestDelay);
}

void Dial::on_events(std::uint32_t) {
  if (!greeting_) {
    if (const int error = socket_.take_error()) return retry(system_words(error));
    Bytes hello;
    auto handshake = std::make_unique<DialerHandshake>(terms_, place_, secret_, hello);
    greeting_.emplace(std::move(handshake), std::move(hello));
  }
  switch (greeting_->advance(socket_)) {
    case Greeting::Progress::kWaiting:
      watch_->set(greeting_->wants_to_write() ? EPOLLIN | EPOLLOUT : EPOLLIN);
      return;
    case Greeting::Progress::kClosed:
      // It may have made room for another client, or be on its way out: try again.
      return retry("the listener hung up during the handshake (have all ranks the same options?)");
    case Greeting::Progress::kDone:
      watch_.reset();
      const auto done = done_;  // outlives this object, which done() may destroy
      done(std::move(socket_));
      return;
  }
}

}  // namespace ringkern
