// An epoll loop and its thread, knowing neither sockets nor links: file descriptors that become
// ready, and timers that come due.

#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

namespace ringkern {

using Clock = std::chrono::steady_clock;

// As Times has it: steady_clock is CLOCK_MONOTONIC with every C++ library on Linux.
inline std::int64_t nanoseconds(Clock::time_point when) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count();
}

// A mutex of which one holder cannot take a second turn while another thread waits. Without this
// the loop, which unlocks only to lock again, would keep callers out for as long as bytes flow.
class FairMutex {
 public:
  void lock() {
    next_.lock();  // held by the first of those that wait
    mutex_.lock();
    next_.unlock();
  }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex next_, mutex_;
};

// A descriptor that is closed when it goes. Negative: a system call failed, which throws.
class Descriptor {
 public:
  Descriptor(int fd, const char* what);
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  const int fd_;
};

// What a descriptor's readiness is reported to. May be destroyed in its own on_events().
class Handler {
 public:
  virtual ~Handler() = default;
  virtual void on_events(std::uint32_t events) = 0;
};

// Handlers and timers run with `mutex` held, released between any two of them: timers on the loop's
// thread, handlers there or on a thread that helps. Every other function, except help(), nudge()
// and stop(), is called with the mutex held, on any thread. An exception that escapes a handler
// goes to `on_error`, also under the mutex.
//
// Descriptors are in a set of their own, which the thread's epoll watches as one descriptor. To
// help is to unwatch that set, which does not disturb the thread's sleep, and to wait on it.
class Loop {
 public:
  using Timer = std::pair<Clock::time_point, std::uint64_t>;

  Loop(FairMutex& mutex, std::function<void(const std::exception&)> on_error);
  ~Loop();  // stops

  void start();
  // Ends the thread. It does not block for long: no call that the loop makes waits for a peer.
  void stop();

  // Runs handlers on the calling thread until `done`, for at most `slice`: a caller that would only
  // wait for the loop saves the switch between threads. Returns false at once, having done
  // nothing, where another thread helps already.
  bool help(const std::function<bool()>& done, std::chrono::milliseconds slice);
  // For how long help() asks again and again before it sleeps: what waking up takes, where there is
  // a core to spare for it. Set before start().
  void set_spin(std::chrono::microseconds spin) { spin_ = spin; }
  // Makes help() ask `done` again.
  void nudge();

  Timer at(Clock::time_point when, std::function<void()> action);
  void cancel(Timer timer) { timers_.erase(timer); }

 private:
  friend class Watch;

  void run();
  int take_turn(int timeout_ms);  // returns how many events there were
  void dispatch(std::uint64_t token, std::uint32_t events);
  void watch_set(bool on);
  void run_timers();
  int milliseconds_to_next_timer();
  void wake();
  void guarded(const std::function<void()>& action) noexcept;

  FairMutex& mutex_;
  const std::function<void(const std::exception&)> on_error_;
  const Descriptor epoll_;  // of the thread: wake_, and set_ while nobody helps
  const Descriptor wake_;
  const Descriptor set_;  // epoll of everything that has a Watch, and of nudge_
  const Descriptor nudge_;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> helped_{false};
  std::chrono::microseconds spin_{0};
  std::thread thread_;
  std::map<Timer, std::function<void()>> timers_;
  std::unordered_map<std::uint64_t, Handler*> handlers_;
  std::uint64_t last_id_ = 0;
};

// Registers one descriptor with the loop for as long as it exists. Declare it after the socket, so
// that it goes first.
class Watch {
 public:
  Watch(Loop& loop, int fd, Handler* handler);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // EPOLLIN, EPOLLOUT, both; 0 means not watched at all, not even for hang-ups, which epoll would
  // otherwise report again and again.
  void set(std::uint32_t events);

 private:
  Loop& loop_;
  const int fd_;
  const std::uint64_t token_;  // never used again, so an event that comes late finds nobody
  std::uint32_t events_ = 0;
};

}  // namespace ringkern
