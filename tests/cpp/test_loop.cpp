#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "loop.h"
#include "socket.h"

using namespace ringkern;
using std::chrono::milliseconds;

namespace {

struct Fixture {
  ~Fixture() { loop.stop(); }

  // Runs the action with the mutex held, as any user of the loop does.
  void locked(const std::function<void()>& action) {
    const std::lock_guard<FairMutex> lock(mutex);
    action();
  }

  FairMutex mutex;
  std::promise<std::string> error;
  Loop loop{mutex, [this](const std::exception& e) { error.set_value(e.what()); }};
};

class Call : public Handler {
 public:
  explicit Call(std::function<void()> action) : action_(std::move(action)) {}
  void on_events(std::uint32_t) override { action_(); }

 private:
  std::function<void()> action_;
};

// Two connected sockets.
struct Wire {
  Wire() {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    a = Socket(fds[0]);
    b = Socket(fds[1]);
  }
  Socket a, b;
};

template <typename T>
T get(std::promise<T>& promise) {
  auto future = promise.get_future();
  REQUIRE(future.wait_for(std::chrono::seconds(10)) == std::future_status::ready);
  return future.get();
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "timers run in the order of their times, also when set from outside") {
  std::vector<int> order;
  std::promise<bool> done;
  loop.start();
  locked([&] {
    const auto now = Clock::now();
    loop.at(now + milliseconds(30), [&] { done.set_value(true); });
    loop.at(now + milliseconds(20), [&] { order.push_back(2); });
    loop.at(now + milliseconds(10), [&] { order.push_back(1); });
    const auto cancelled = loop.at(now + milliseconds(15), [&] { order.push_back(9); });
    loop.cancel(cancelled);
  });
  get(done);
  locked([&] { CHECK(order == std::vector<int>{1, 2}); });
}

TEST_CASE_FIXTURE(Fixture, "a timer that is set wakes a loop that waits for nothing") {
  loop.start();
  std::promise<bool> first, second;
  locked([&] { loop.at(Clock::now(), [&] { first.set_value(true); }); });
  get(first);
  locked([&] { loop.at(Clock::now(), [&] { second.set_value(true); }); });
  get(second);
}

TEST_CASE_FIXTURE(Fixture, "a handler may destroy itself, and others of the same batch") {
  Wire one, two;
  std::promise<bool> done;
  int calls = 0;
  std::unique_ptr<Call> calls_a, calls_b;
  std::unique_ptr<Watch> watch_a, watch_b;
  const auto remove_both = [&] {
    ++calls;
    watch_a.reset();
    watch_b.reset();
    const auto end = [&] { done.set_value(true); };
    loop.at(Clock::now() + milliseconds(20), end);
    calls_a.reset();  // `this` of one of them: nothing of it is used below
  };
  calls_a = std::make_unique<Call>(remove_both);
  calls_b = std::make_unique<Call>([&] { calls_a ? (*calls_a).on_events(0) : void(); });
  locked([&] {
    watch_a = std::make_unique<Watch>(loop, one.a.fd(), calls_a.get());
    watch_b = std::make_unique<Watch>(loop, two.a.fd(), calls_b.get());
    watch_a->set(EPOLLIN);
    watch_b->set(EPOLLIN);
    REQUIRE(one.b.send("x", 1) == 1);
    REQUIRE(two.b.send("x", 1) == 1);
  });
  loop.start();
  get(done);
  locked([&] { CHECK(calls == 1); });
}

TEST_CASE_FIXTURE(Fixture, "a socket that is not watched is not reported, not even its end") {
  Wire wire;
  int calls = 0;
  Call call([&] { ++calls; });
  std::unique_ptr<Watch> watch;
  std::promise<bool> done;
  locked([&] {
    watch = std::make_unique<Watch>(loop, wire.a.fd(), &call);
    watch->set(EPOLLIN);
    watch->set(0);
  });
  loop.start();
  wire.b.close();
  locked([&] { loop.at(Clock::now() + milliseconds(20), [&] { done.set_value(true); }); });
  get(done);
  locked([&] {
    CHECK(calls == 0);
    watch.reset();
  });
}

TEST_CASE_FIXTURE(Fixture, "an exception goes to on_error and the loop lives on") {
  loop.start();
  std::promise<bool> done;
  locked([&] {
    loop.at(Clock::now(), [] { throw std::runtime_error("boom"); });
    loop.at(Clock::now() + milliseconds(5), [&] { done.set_value(true); });
  });
  CHECK(get(error) == "boom");
  get(done);
}

TEST_CASE_FIXTURE(Fixture, "a busy holder lets a waiting thread in") {
  // The holder unlocks only to lock again, as the loop does; the other must get its turns.
  std::atomic<bool> stop{false};
  std::thread holder([&] {
    while (!stop) locked([] {});
  });
  for (int i = 0; i < 100; ++i) locked([] {});
  stop = true;
  holder.join();
  loop.stop();
  loop.stop();
}

TEST_CASE_FIXTURE(Fixture, "a thread that helps runs the handlers itself, and alone") {
  Wire wire;
  std::thread::id ran_on;
  bool second_helped = true;
  Call call([&] {
    char byte;
    REQUIRE(wire.a.receive(&byte, 1) == 1);
    ran_on = std::this_thread::get_id();
    second_helped = loop.help([] { return false; }, milliseconds(0));
  });
  std::unique_ptr<Watch> watch;
  loop.start();
  locked([&] {
    watch = std::make_unique<Watch>(loop, wire.a.fd(), &call);
    watch->set(EPOLLIN);
  });
  std::promise<bool> helping;
  std::thread sender([&] {
    get(helping);
    REQUIRE(wire.b.send("x", 1) == 1);
  });
  bool first = true;
  const auto arrived = [&] {
    if (first) helping.set_value(true);
    first = false;
    return ran_on != std::thread::id();
  };
  CHECK(loop.help(arrived, milliseconds(10000)));
  sender.join();
  CHECK(ran_on == std::this_thread::get_id());
  CHECK_FALSE(second_helped);

  // Nobody helps any more: the loop's own thread sees the next byte.
  std::promise<std::thread::id> later;
  locked([&] {
    watch.reset();
    call = Call([&] {
      watch->set(0);
      later.set_value(std::this_thread::get_id());
    });
    watch = std::make_unique<Watch>(loop, wire.a.fd(), &call);
    watch->set(EPOLLIN);
  });
  REQUIRE(wire.b.send("y", 1) == 1);
  CHECK(get(later) != std::this_thread::get_id());
  locked([&] { watch.reset(); });
}

TEST_CASE_FIXTURE(Fixture, "a nudge makes a thread that helps look up") {
  std::atomic<bool> done{false};
  std::promise<bool> asked;
  std::thread other([&] {
    get(asked);
    done = true;
    loop.nudge();
  });
  bool first = true;
  const auto started = Clock::now();
  loop.help(
      [&] {
        if (first) asked.set_value(true);
        first = false;
        return done.load();
      },
      milliseconds(20000));
  CHECK(Clock::now() - started < milliseconds(10000));
  other.join();
}
