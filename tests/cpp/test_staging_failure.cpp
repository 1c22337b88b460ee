// Rings for a GPU's memory over TCP that fail: every rank must learn it and name the same rank, and
// nothing may touch a buffer afterwards.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <memory>
#include <vector>

#include "failing_ranks.h"
#include "staged_ranks.h"

using namespace ringkern;
using std::chrono::milliseconds;

namespace {

struct Options {
  int world_size = 3;
  int timeout_ms = 20000;
  int grace_ms = 20000;
};

// Ring steps of many pieces.
Failure turn(const StagedRank& it, int world_size) {
  return turn_until_failure(it.rank, world_size, it.ring, it.stream,
                            [&] { stub::drained(it.stream); });
}

// Posts nothing until the ring has failed, so that the failure is another rank's.
Failure idle_until_failure(const StagedRank& it) {
  return failure_of([&] {
    for (;;) it.ring.wait(it.ring.exchange({}, {}, it.stream), it.stream);
  });
}

// Runs the body on all ranks; it returns each rank's failure.
std::vector<Failure> fail_ranks(const Options& options,
                                const std::function<Failure(const StagedRank&)>& body) {
  std::vector<Failure> failures(static_cast<std::size_t>(options.world_size));
  Ports ports(options.world_size);
  Meeting meeting(options.world_size);
  in_parallel(failures.size(), [&](int rank) {
    WatchedWire* wire = nullptr;
    const auto ring = join_staged(ports, rank, staging_options(64, 2, options.grace_ms),
                                  options.timeout_ms, &wire);
    const CallerStream own;
    const Stream stream = own.handle;
    const auto meet = [&] { meeting.meet(); };
    meet();
    const Failure failure = failures[static_cast<std::size_t>(rank)] =
        body({rank, *wire, *ring, stream, meet});
    check_stays_failed(*ring, failure, stream);
    CHECK(ring->poll(1, milliseconds(0)));
    const Failure on_host = failure_of([&] { ring->host().exchange({}, {}, 0); });
    CHECK(on_host.origin == failure.origin);
    CHECK(on_host.kind == failure.kind);
    ring->close();
    sync(stream);
  });
  return failures;
}

}  // namespace

TEST_CASE("an abort in the middle of messages reaches every rank") {
  const CleanStaged clean;
  const auto failures = fail_ranks({}, [](const StagedRank& it) {
    if (it.rank == 1) {
      // After some steps.
      auto aborting = std::async(std::launch::async, [&] {
        until([&] { return it.wire.posted() > 100; });
        it.ring.abort("had enough");
      });
      return turn(it, 3);
    }
    return turn(it, 3);
  });
  check_all(failures, 1, Kind::kTransport, "rank 1 of 3 was aborted: had enough");
}

TEST_CASE("an abort reaches ranks that have nothing to do, and a failure of the host's side too") {
  for (const bool on_host : {false, true}) {
    const CleanStaged clean;
    const auto failures = fail_ranks({}, [&](const StagedRank& it) {
      if (it.rank == 1) (on_host ? it.ring.host() : it.ring).abort("had enough");
      return idle_until_failure(it);
    });
    check_all(failures, 1, Kind::kTransport, "rank 1 of 3 was aborted: had enough");
  }
}

TEST_CASE("sizes that differ end the ring on both ends, wherever they are cut") {
  struct Case {
    std::size_t sent, expected;
    const char* words;
  };
  for (const Case& c : {Case{0, 1, "has 0 bytes where it is sent and 1 bytes where"},
                        Case{5, 0, "has 5 bytes where it is sent and 0 bytes where"},
                        Case{63, 65, "has 63 bytes where it is sent and 64 bytes where"},
                        Case{64, 63, "has 64 bytes where it is sent and 63 bytes where"},
                        Case{64, 0, "has 64 bytes where it is sent and 0 bytes where"},
                        Case{64, 128, "message 1 from rank 0 to rank 1 has 0 bytes where it is se"},
                        Case{128, 64, "message 1 from rank 0 to rank 1 has 64 bytes where it is s"},
                        Case{128, 129, "message 2 from rank 0 to rank 1 has 0 bytes where it is s"},
                        Case{640, 1000, "message 10 from rank 0 to rank 1 has 0 bytes where it is"},
                        Case{1000, 641, "has 64 bytes where it is sent and 1 bytes where"}}) {
    CAPTURE(c.sent);
    CAPTURE(c.expected);
    const CleanStaged clean;
    const auto failures = fail_ranks({}, [&](const StagedRank& it) {
      if (it.rank == 2) return idle_until_failure(it);
      Buffer buffer(1000), more(1000);
      return failure_of([&] {
        // What follows must not make up for it.
        const Ticket first =
            it.rank == 0
                ? it.ring.exchange({{1, buffer.data(), c.sent}, {1, more.data(), 64}}, {},
                                   it.stream)
                : it.ring.exchange({}, {{0, buffer.data(), c.expected}, {0, more.data(), 64}},
                                   it.stream);
        it.ring.wait(first, it.stream);
      });
    });
    check_all(failures, 0, Kind::kProtocol, c.words);
    CHECK(contains(failures[1].text, "On rank 1 the GPU was at exchange 1 (0 bytes to and"));
    CHECK(contains(failures[1].text, ", in pieces of at most 64 bytes"));
  }
}

TEST_CASE("a call of the driver that fails ends the ring, with CUDA's name for it") {
  for (const char* function :
       {"cuMemHostAlloc", "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuEventCreate",
        "cuEventRecord", "cuEventQuery", "cuStreamWaitEvent", "cuStreamIsCapturing"}) {
    CAPTURE(function);
    const CleanStaged clean;
    const auto failures = fail_ranks({}, [&](const StagedRank& it) {
      // Whose call comes first is open, but not that all name the same rank.
      if (it.rank == 2) stub::fail(function, 700);
      it.meet();
      return turn(it, 3);
    });
    check_all(failures, failures[0].origin, Kind::kTransport,
              concat(function, " failed with CUDA_ERROR_ILLEGAL_ADDRESS (700)"));
  }
}

TEST_CASE("a copy to oneself that fails ends the ring") {
  const CleanStaged clean;
  const auto failures = fail_ranks({1}, [](const StagedRank& it) {
    stub::fail("cuMemcpyDtoDAsync", 700);
    return turn(it, 1);
  });
  check_all(failures, 0, Kind::kTransport, "cuMemcpyDtoDAsync failed with CUDA_ERROR_ILLEGAL_ADD");
}

TEST_CASE("a rank that leaves in the middle fails the others, and its own callers") {
  const CleanStaged clean;
  Ports ports(2);
  in_parallel(2, [&](int rank) {
    WatchedWire* wire = nullptr;
    const auto ring = join_staged(ports, rank, staging_options(), 20000, &wire);
    const CallerStream own;
    const Stream stream = own.handle;
    if (rank == 0) {
      auto out = std::make_unique<Buffer>(1000);
      wire->let_out = 3;
      const Ticket ticket = ring->exchange({{1, out->data(), 1000}}, {}, stream);
      auto waiting = std::async(std::launch::async,
                                [&] { return failure_of([&] { ring->wait(ticket, stream); }); });
      until([&] { return wire->sent().size() == 5; });
      ring->close();
      out.reset();
      CHECK(waiting.get().text == "rank 0 of 2 has closed this ring");
      CHECK(ring->settled() == ticket);
    } else {
      auto in = std::make_unique<Buffer>(1000);
      const Failure failure = failure_of(
          [&] { ring->wait(ring->exchange({}, {{0, in->data(), 1000}}, stream), stream); });
      in.reset();
      CHECK(failure.origin == 0);
      CHECK(contains(failure.text, "rank 0"));
    }
    ring->close();
    sync(stream);
  });
}

TEST_CASE("a rank that never posts is blamed by all, itself too") {
  const CleanStaged clean;
  const auto start = std::chrono::steady_clock::now();
  const auto failures = fail_ranks({4, 1000}, [](const StagedRank& it) {
    return it.rank == 2 ? idle_until_failure(it) : turn(it, 4);
  });
  check_all(failures, 2, Kind::kTimeout, "Rank 2 is alive but has not posted its side");
  CHECK(std::chrono::steady_clock::now() - start < milliseconds(5000));
}

TEST_CASE("the deadline counts from when the GPU could begin") {
  const CleanStaged clean;
  const auto failures = fail_ranks({2, 400}, [](const StagedRank& it) {
    const Gate gate;
    const auto start = std::chrono::steady_clock::now();
    gate.put(it.stream);
    Messages messages(it, {1 - it.rank}, 1000, 0);
    until([&] { return std::chrono::steady_clock::now() - start > milliseconds(600); });
    it.meet();
    gate.open();
    messages.finish();
    // And then it does count.
    if (it.rank == 1) return idle_until_failure(it);
    Buffer in(1000);
    return failure_of(
        [&] { it.ring.wait(it.ring.exchange({}, {{1, in.data(), 1000}}, it.stream), it.stream); });
  });
  check_all(failures, 1, Kind::kTimeout, "Rank 1 is alive but has not posted its side");
}

TEST_CASE("a failure is raised when the GPU has ended its copies, and not before") {
  const CleanStaged clean;
  const auto failures = fail_ranks({2}, [](const StagedRank& it) {
    if (it.rank == 1) {
      it.meet();
      it.ring.abort("no");
      return idle_until_failure(it);
    }
    stub::let_copies("DtoH", 0);
    auto out = std::make_unique<Buffer>(1000);
    const Ticket ticket = it.ring.exchange({{1, out->data(), 1000}}, {}, it.stream);
    until([&] { return times("DtoH put", *out) == 2; });
    it.meet();
    // The host's side fails at once.
    failure_of([&] {
      for (;;) it.ring.host().wait(it.ring.host().exchange({}, {}, 0), 0);
    });
    CHECK_FALSE(it.ring.poll(ticket, milliseconds(50)));
    CHECK(it.ring.settled() < ticket);
    stub::let_copies("DtoH", -1);
    const Failure failure = failure_of([&] { it.ring.wait(ticket, it.stream); });
    CHECK(it.ring.settled() == ticket);
    out.reset();
    CHECK(contains(failure.text, "On rank 0 the GPU was at exchange 1 (1000 bytes to and 0 bytes"));
    return failure;
  });
  check_all(failures, 1, Kind::kTransport, "rank 1 of 2 was aborted: no");
}

TEST_CASE("a GPU that does not end its copies keeps nobody waiting, and the buffers stay") {
  const CleanStaged clean;
  const auto start = std::chrono::steady_clock::now();
  const auto failures = fail_ranks({2, 20000, 200}, [](const StagedRank& it) {
    const Gate gate;
    gate.put(it.stream);
    Buffer out(1000);
    const Ticket ticket = it.ring.exchange({{1 - it.rank, out.data(), 1000}}, {}, it.stream);
    until([&] { return times("DtoH put", out) == 2; });
    it.meet();
    if (it.rank == 1) it.ring.abort("no");
    const Failure failure = failure_of([&] { it.ring.wait(ticket, it.stream); });
    CHECK(it.ring.settled() < ticket);
    CHECK(it.ring.poll(ticket, milliseconds(0)));
    it.ring.close();
    CHECK(stub::pinned_alive() > 0);
    it.meet();
    gate.open();  // before the ring goes, which frees what it still can
    until([&] { return stub::drained(it.stream) && times("DtoH done", out) == 2; });
    return failure;
  });
  check_all(failures, 1, Kind::kTransport, "rank 1 of 2 was aborted: no");
  CHECK(std::chrono::steady_clock::now() - start < milliseconds(5000));
}

TEST_CASE("pinned memory that cannot be freed, as others keep the GPU busy, keeps nobody waiting") {
  const CleanStaged clean;
  const auto start = std::chrono::steady_clock::now();
  const auto failures = fail_ranks({3, 20000, 200}, [](const StagedRank& it) {
    const int next = (it.rank + 1) % 3, prev = (it.rank + 2) % 3;
    Buffer out(1000), in(1000);
    it.ring.wait(it.ring.exchange({{next, out.data(), 1000}}, {{prev, in.data(), 1000}}, it.stream),
                 it.stream);
    sync(it.stream);
    it.meet();
    stub::hold_frees(true);
    if (it.rank == 1) it.ring.abort("had enough");
    return idle_until_failure(it);
  });
  check_all(failures, 1, Kind::kTransport, "rank 1 of 3 was aborted: had enough");
  CHECK(std::chrono::steady_clock::now() - start < milliseconds(10000));
  CHECK(stub::pinned_alive() > 0);
  stub::hold_frees(false);
  // The threads that were left behind give back what they kept.
  until([] { return stub::contexts_retained() == 0; });
}

TEST_CASE("a GPU that cannot be used is refused; a new ring works afterwards") {
  for (const char* function : {"cuDevicePrimaryCtxRetain", "cuStreamCreateWithPriority"}) {
    const CleanStaged clean;
    stub::fail(function, 700);
    Ports ports(1);
    CHECK_THROWS_WITH_AS(
        join_staged(ports, 0, StagingOptions()),
        concat("GPU 0: ", function, " failed with CUDA_ERROR_ILLEGAL_ADDRESS (700).").c_str(),
        UnsupportedError);
  }
  const CleanStaged clean;
  fail_ranks({2}, [](const StagedRank& it) {
    if (it.rank == 0) it.ring.abort("over");
    return turn(it, 2);
  });
  run_staged(2, staging_options(), [](const StagedRank& it) { swap(it, {1 - it.rank}, 1000, 0); });
}
