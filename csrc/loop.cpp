#include "loop.h"

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "error.h"

namespace ringkern {
namespace {

constexpr std::uint64_t kWakeToken = 0;

}  // namespace

Loop::Loop(FairMutex& mutex, std::function<void(const std::exception&)> on_error)
    : mutex_(mutex), on_error_(std::move(on_error)) {
  epoll_fd_ = ::epoll_create1(EPOLL_CLOEXEC);
  wake_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeToken;
  if (epoll_fd_ < 0 || wake_fd_ < 0 ||
      ::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, &event) != 0) {
    const std::string words = system_words(errno);
    if (epoll_fd_ >= 0) ::close(epoll_fd_);
    if (wake_fd_ >= 0) ::close(wake_fd_);
    throw UnsupportedError(concat("making the poll loop: ", words, "."));
  }
}

Loop::~Loop() {
  stop();
  ::close(wake_fd_);
  ::close(epoll_fd_);
}

void Loop::start() {
  // Signals are for the program's own threads: Python's Ctrl-C must interrupt them, not this one.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "ringkern");
}

void Loop::stop() {
  stopping_ = true;
  wake();
  if (thread_.joinable()) thread_.join();
}

void Loop::wake() {
  const std::uint64_t one = 1;
  // A full counter is as good a wake as any, so the result does not matter.
  [[maybe_unused]] const ssize_t n = ::write(wake_fd_, &one, sizeof(one));
}

Loop::Timer Loop::at(Clock::time_point when, std::function<void()> action) {
  const Timer timer{when, ++last_id_};
  timers_.emplace(timer, std::move(action));
  if (timers_.begin()->first == timer) wake();  // epoll_wait was told of a later one, or of none
  return timer;
}

int Loop::milliseconds_to_next_timer() {
  const std::lock_guard<FairMutex> lock(mutex_);
  if (timers_.empty()) return -1;
  const auto left = timers_.begin()->first.first - Clock::now();
  const auto rounded_up = std::chrono::ceil<std::chrono::milliseconds>(left).count();
  return static_cast<int>(std::clamp<std::int64_t>(rounded_up, 0, 60000));
}

void Loop::run() {
  std::array<epoll_event, 64> events;
  while (!stopping_) {
    const int timeout_ms = milliseconds_to_next_timer();
    const int count = ::epoll_wait(epoll_fd_, events.data(), events.size(), timeout_ms);
    for (int i = 0; i < count && !stopping_; ++i) {
      dispatch(events[i].data.u64, events[i].events);
    }
    run_timers();
  }
}

void Loop::dispatch(std::uint64_t token, std::uint32_t events) {
  if (token == kWakeToken) {
    std::uint64_t count;
    [[maybe_unused]] const ssize_t n = ::read(wake_fd_, &count, sizeof(count));
    return;
  }
  const std::lock_guard<FairMutex> lock(mutex_);
  // An earlier event of the same batch may have removed this one's handler.
  const auto found = handlers_.find(token);
  if (found == handlers_.end()) return;
  guarded([&] { found->second->on_events(events); });
}

void Loop::run_timers() {
  const auto now = Clock::now();
  for (;;) {
    const std::lock_guard<FairMutex> lock(mutex_);
    if (timers_.empty() || timers_.begin()->first.first > now || stopping_) return;
    const auto action = std::move(timers_.begin()->second);
    timers_.erase(timers_.begin());
    guarded(action);
  }
}

void Loop::guarded(const std::function<void()>& action) noexcept {
  try {
    action();
  } catch (const std::exception& error) {
    on_error_(error);
  } catch (...) {
    on_error_(std::bad_exception());
  }
}

Watch::Watch(Loop& loop, int fd, Handler* handler) : loop_(loop), fd_(fd), token_(++loop.last_id_) {
  loop_.handlers_.emplace(token_, handler);
}

Watch::~Watch() {
  set(0);
  loop_.handlers_.erase(token_);
}

void Watch::set(std::uint32_t events) {
  if (events == events_) return;
  epoll_event event{};
  event.events = events;
  event.data.u64 = token_;
  const int action = events_ == 0 ? EPOLL_CTL_ADD : events == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
  if (::epoll_ctl(loop_.epoll_fd_, action, fd_, &event) != 0 && events != 0) {
    throw UnsupportedError(concat("watching a socket: ", system_words(errno), "."));
  }
  events_ = events;
}

}  // namespace ringkern
