// Joining a ring that does not come about, and processes that fork.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>

#include "ranks.h"

using namespace ringkern;
using Clock = std::chrono::steady_clock;

TEST_CASE("an address that nobody listens on") {
  Ports ports(2);
  ports.listeners[0].close();
  const auto start = Clock::now();
  const Failure failure = failure_of([&] { ports.join(1, test_options(1, false, 500)); });
  CHECK(failure.kind == Kind::kTimeout);
  CHECK(failure.origin == 0);
  CHECK(contains(failure.text, "connecting with rank 0 (" + ports.addresses[0] + ")"));
  CHECK(contains(failure.text, "Connection refused"));
  CHECK(Clock::now() - start < std::chrono::seconds(2));
}

TEST_CASE("a neighbour that never comes") {
  Ports ports(2);
  const Failure failure = failure_of([&] { ports.join(0, test_options(1, false, 500)); });
  CHECK(failure.kind == Kind::kTimeout);
  CHECK(failure.origin == 1);
  CHECK(contains(failure.text, "it has not connected"));
}

TEST_CASE("a listener that comes late is found") {
  Ports ports(2);
  // The address is known before somebody listens on it: what was there refuses, and comes back.
  const std::string address = ports.addresses[0];
  std::promise<void> dialling;
  auto is_dialling = dialling.get_future();
  in_parallel(2, [&](int rank) {
    TcpOptions options = test_options();
    bool told = false;
    options.on_idle = [&] {
      if (rank == 1 && !std::exchange(told, true)) dialling.set_value();
    };
    if (rank == 0) is_dialling.wait();
    const auto ring = ports.join(rank, options);
  });
}

TEST_CASE("waiting for neighbours can be interrupted") {
  Ports ports(2);
  TcpOptions options = test_options();
  options.on_idle = [] { throw std::runtime_error("interrupted"); };
  CHECK_THROWS_WITH(ports.join(0, options), "interrupted");
}

TEST_CASE("a forked child may not use the ring, nor harm it") {
  run_ranks(1, test_options(), [](int, Transport&) {});
  Ports ports(2);
  std::unique_ptr<Transport> rings[2];
  in_parallel(2, [&](int rank) { rings[rank] = ports.join(rank, test_options()); });
  const pid_t child = ::fork();
  if (child == 0) {
    bool refused = false;
    try {
      rings[0]->exchange({}, {}, 0);
    } catch (const TransportError&) {
      refused = true;
    }
    rings[0].reset();
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  in_parallel(2, [&](int rank) {
    int out = rank, in = -1;
    rings[rank]->wait(rings[rank]->exchange({{1 - rank, &out, 4}}, {{1 - rank, &in, 4}}, 0), 0);
    CHECK(in == 1 - rank);
  });
}
