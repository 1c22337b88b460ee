#include "loop.h"

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "error.h"

namespace ringkern {
namespace {

// Tokens of what is no Watch; those count from 1.
constexpr std::uint64_t kSignalToken = 0;
constexpr std::uint64_t kSetToken = ~std::uint64_t{0};

void control(int epoll, int action, int fd, std::uint32_t events, std::uint64_t token) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = token;
  if (::epoll_ctl(epoll, action, fd, &event) != 0 && action != EPOLL_CTL_DEL) {
    throw UnsupportedError(concat("watching a descriptor: ", system_words(errno), "."));
  }
}

void signal(int event_fd) {
  const std::uint64_t one = 1;
  // A full counter is as good a signal as any, so the result does not matter.
  [[maybe_unused]] const ssize_t n = ::write(event_fd, &one, sizeof(one));
}

void take_signal(int event_fd) {
  std::uint64_t count;
  [[maybe_unused]] const ssize_t n = ::read(event_fd, &count, sizeof(count));
}

// struct sched_attr of the kernel's first version, which older C libraries lack.
struct SchedAttributes {
  std::uint32_t size, policy;
  std::uint64_t flags;
  std::int32_t nice;
  std::uint32_t priority;
  std::uint64_t runtime_ns, deadline_ns, period_ns;
};

// Asks for short turns for this thread. It works little and often, and where every core computes, a
// thread of short turns is let in first: bytes move although nobody waits for them. Linux 6.12 and
// later heed it for ordinary threads; before, nothing changes.
void ask_for_short_turns() {
  SchedAttributes attributes{};
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;  // what somebody chose stays
  attributes.runtime_ns = 100'000;               // the least that the kernel takes
  ::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace

Descriptor::Descriptor(int fd, const char* what) : fd_(fd) {
  if (fd < 0) throw UnsupportedError(concat("making ", what, ": ", system_words(errno), "."));
}

Descriptor::~Descriptor() { ::close(fd_); }

Loop::Loop(FairMutex& mutex, std::function<void(const std::exception&)> on_error)
    : mutex_(mutex),
      on_error_(std::move(on_error)),
      epoll_(::epoll_create1(EPOLL_CLOEXEC), "the loop's epoll"),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "the loop's eventfd"),
      set_(::epoll_create1(EPOLL_CLOEXEC), "the set's epoll"),
      nudge_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "the set's eventfd") {
  control(epoll_, EPOLL_CTL_ADD, wake_, EPOLLIN, kSignalToken);
  control(set_, EPOLL_CTL_ADD, nudge_, EPOLLIN, kSignalToken);
  control(epoll_, EPOLL_CTL_ADD, set_, EPOLLIN, kSetToken);
}

Loop::~Loop() { stop(); }

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

void Loop::wake() { signal(wake_); }

void Loop::nudge() { signal(nudge_); }

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
  ask_for_short_turns();
  std::array<epoll_event, 2> events;
  while (!stopping_) {
    const int count =
        ::epoll_wait(epoll_, events.data(), events.size(), milliseconds_to_next_timer());
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 == kSignalToken) take_signal(wake_);
      if (events[i].data.u64 == kSetToken) take_turn(0);
    }
    run_timers();
  }
}

int Loop::take_turn(int timeout_ms) {
  std::array<epoll_event, 64> events;
  const int count = ::epoll_wait(set_, events.data(), events.size(), timeout_ms);
  for (int i = 0; i < count && !stopping_; ++i) dispatch(events[i].data.u64, events[i].events);
  return count;
}

bool Loop::help(const std::function<bool()>& done, std::chrono::milliseconds slice) {
  if (helped_.exchange(true)) return false;
  watch_set(false);
  const auto end = Clock::now() + slice;
  auto sleep_at = Clock::now() + spin_;
  while (!done() && !stopping_) {
    const auto now = Clock::now();
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - now);
    if (left.count() <= 0) break;
    const bool spins = now < sleep_at;
    if (take_turn(spins ? 0 : static_cast<int>(left.count())) > 0) sleep_at = Clock::now() + spin_;
  }
  watch_set(true);
  helped_ = false;
  return true;
}

void Loop::watch_set(bool on) {
  control(epoll_, EPOLL_CTL_MOD, set_, on ? std::uint32_t{EPOLLIN} : 0, kSetToken);
}

void Loop::dispatch(std::uint64_t token, std::uint32_t events) {
  if (token == kSignalToken) return take_signal(nudge_);
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
  const int action = events_ == 0 ? EPOLL_CTL_ADD : events == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
  control(loop_.set_, action, fd_, events, token_);
  events_ = events;
}

}  // namespace ringkern
