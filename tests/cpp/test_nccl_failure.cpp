// Rings over NCCL that fail: every rank must learn it in time and name the same rank, and nothing
// may touch a buffer afterwards.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <vector>

#include "failing_nccl.h"

using namespace ringkern;
using Buffer = std::vector<std::uint8_t>;
using std::chrono::milliseconds;

namespace {

constexpr int kRemote = 6, kInternal = 3;

Failure turn(int rank, int world_size, DeviceTransport& ring, Stream stream) {
  return turn_until_failure(rank, world_size, ring, stream, [&] { stub::drained(stream); });
}

}  // namespace

TEST_CASE("an abort reaches every rank, and ends each communicator once") {
  const CleanStubs clean;
  const auto failures = fail_ranks({}, [](int rank, DeviceTransport& ring, Stream stream) {
    if (rank == 1) ring.abort("had enough");
    return turn(rank, 3, ring, stream);
  });
  check_all(failures, 1, Kind::kTransport, "rank 1 of 3 was aborted: had enough");
  CHECK(stub::calls("ncclCommAbort") == 3);
  CHECK(stub::calls("ncclCommDestroy") == 0);
}

TEST_CASE("an exchange that the peers never post is in the error") {
  const CleanStubs clean;
  std::atomic<int> posted{0};
  const auto failures = fail_ranks({2}, [&](int rank, DeviceTransport& ring, Stream stream) {
    Buffer out(100);
    if (rank == 0) {
      const Ticket ticket = ring.exchange({{1, out.data(), 100}}, {}, stream);
      ring.wait(ticket, stream);
      CHECK(ring.settled() < ticket);
      posted = 1;
    } else {
      until([&] { return posted == 1; });
      ring.abort("no");
    }
    const Failure failure = failure_of([&] {
      for (;;) ring.exchange({}, {}, stream);
    });
    CHECK(ring.settled() >= 1);
    return failure;
  });
  check_all(failures, 1, Kind::kTransport, "rank 1 of 2 was aborted: no");
  CHECK(
      contains(failures[0].text,
               ". On rank 0 NCCL was at exchange 2 (100 bytes to and 0 bytes from rank 1), open"));
}

TEST_CASE("a call of NCCL that fails ends the ring, with NCCL's words") {
  for (const char* function : {"ncclGroupStart", "ncclRecv", "ncclSend", "ncclGroupEnd"}) {
    CAPTURE(function);
    const CleanStubs clean;
    const auto failures = fail_ranks({}, [&](int rank, DeviceTransport& ring, Stream stream) {
      if (rank == 2) {
        stub::fail_nccl(function, kInternal);
      } else {
        // Posts nothing until the ring has failed, so that the failure is rank 2's.
        return failure_of([&] {
          for (;;) ring.wait(ring.exchange({}, {}, stream), stream);
        });
      }
      return turn(rank, 3, ring, stream);
    });
    check_all(failures, 2, Kind::kTransport,
              concat("NCCL 2.28.9: ", function, " failed: some error (the stub's last words)"));
    CHECK(stub::calls("ncclCommAbort") == 3);
  }
}

TEST_CASE("a call of the driver that fails ends the ring, with CUDA's name for it") {
  for (const char* function : {"cuEventQuery", "cuEventRecord", "cuStreamWaitEvent"}) {
    CAPTURE(function);
    const CleanStubs clean;
    const auto failures = fail_ranks({1}, [&](int rank, DeviceTransport& ring, Stream stream) {
      stub::fail(function, 700, 1);
      return turn(rank, 1, ring, stream);
    });
    check_all(failures, 0, Kind::kTransport,
              concat(function, " failed with CUDA_ERROR_ILLEGAL_ADDRESS (700)"));
  }
}

TEST_CASE("a capture from which NCCL does not come back is late, and nobody asks for its events") {
  const CleanStubs clean;
  const auto failures = fail_ranks({1, 300}, [](int, DeviceTransport& ring, Stream stream) {
    int out = 1, in = 0;
    stub::set_progress(1 << 30);
    stub::begin_capture(stream);
    const Failure failure =
        failure_of([&] { ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream); });
    stub::end_capture(stream);
    stub::end_graphs();
    return failure;
  });
  check_all(failures, 0, Kind::kTimeout,
            "NCCL: exchange 2 (4 bytes to and 4 bytes from this rank)");
}

TEST_CASE("an error that NCCL meets by itself ends the ring") {
  const CleanStubs clean;
  const auto failures = fail_ranks({}, [](int rank, DeviceTransport& ring, Stream stream) {
    if (rank == 2) stub::set_async_error(2, kInternal);
    return turn(rank, 3, ring, stream);
  });
  check_all(failures, 2, Kind::kTransport, "NCCL 2.28.9: the communicator failed: some error");
}

TEST_CASE("when NCCL says that some peer is gone, the control ring says which") {
  for (const bool known : {true, false}) {
    CAPTURE(known);
    const CleanStubs clean;
    const auto start = std::chrono::steady_clock::now();
    const auto failures = fail_ranks({}, [&](int rank, DeviceTransport& ring, Stream stream) {
      if (rank == 0) stub::set_async_error(0, kRemote);
      if (rank == 2 && known) {
        until_watched(10);
        ring.abort("died");
      }
      return turn(rank, 3, ring, stream);
    });
    if (known) {
      check_all(failures, 2, Kind::kTransport, "rank 2 of 3 was aborted: died");
    } else {
      check_all(failures, 0, Kind::kTransport, "remote process exited or there was a network err");
      CHECK(std::chrono::steady_clock::now() - start >= milliseconds(1000));
    }
  }
}

TEST_CASE("a rank that never posts is blamed by all, itself too") {
  const CleanStubs clean;
  const auto start = std::chrono::steady_clock::now();
  const auto failures =
      fail_ranks({4, 500, 1500}, [](int rank, DeviceTransport& ring, Stream stream) {
        if (rank != 2) return turn(rank, 4, ring, stream);
        return failure_of([&] {
          for (;;) ring.wait(ring.exchange({}, {}, stream), stream);
        });
      });
  check_all(failures, 2, Kind::kTimeout, "Rank 2 is alive but has not posted its side");
  CHECK(std::chrono::steady_clock::now() - start < milliseconds(5000));
}

TEST_CASE("ranks that disagree on sizes all learn that messages do not match") {
  for (const int world_size : {2, 3}) {
    CAPTURE(world_size);
    const CleanStubs clean;
    const auto start = std::chrono::steady_clock::now();
    const auto failures =
        fail_ranks({world_size, 500, 1500}, [&](int rank, DeviceTransport& ring, Stream stream) {
          const std::size_t size = rank == 1 ? 999 : 1000;
          Buffer out(size), in(size);
          const int next = (rank + 1) % world_size, prev = (rank + world_size - 1) % world_size;
          const Failure failure = failure_of([&] {
            ring.wait(ring.exchange({{next, out.data(), size}}, {{prev, in.data(), size}}, stream),
                      stream);
            for (;;) ring.exchange({}, {}, stream);
          });
          until([&] { return ring.settled() >= 1; });
          return failure;
        });
    // Whoever is first names the rank that it waits for, which may say the same of another.
    for (const Failure& failure : failures) {
      CHECK(failure.kind == Kind::kTimeout);
      CHECK(contains(failure.text, "the ranks have posted messages that do not match"));
      CHECK(failure.text.rfind(concat("rank ", failure.origin, " failed"), 0) == 0);
    }
    CHECK(std::chrono::steady_clock::now() - start < milliseconds(5000));
  }
}

TEST_CASE("the run of a graph is late like an exchange, and one that ends is forgotten") {
  const CleanStubs clean;
  const Gate gate;  // stands for exchanges in the graph, for which rank 2 never comes
  const auto failures = fail_ranks({4, 500, 1500}, [&](int rank, DeviceTransport& ring,
                                                       Stream stream) {
    const Ticket first = ring.begin_run(stream);
    ring.end_run(first, stream);
    until([&] { return ring.settled() >= first; });
    if (rank != 2) {
      const Ticket run = ring.begin_run(stream);
      gate.put(stream);
      ring.end_run(run, stream);
    }
    const Failure failure = failure_of([&] {
      for (;;) ring.wait(ring.exchange({}, {}, stream), stream);
    });
    CHECK(failure_of([&] { ring.begin_run(stream); }).text == failure.text);
    CHECK(failure_of([&] { ring.end_run(first, stream); }).text == failure.text);
    if (rank != 2) {
      CHECK(contains(failure.text, concat("On rank ", rank, " NCCL was at the run of a graph")));
    }
    gate.open();
    return failure;
  });
  check_all(failures, 2, Kind::kTimeout, "Rank 2 is alive but has not posted its side");
}

TEST_CASE("the deadline counts from when the GPU could begin") {
  const CleanStubs clean;
  const Gate gate;
  const auto failures = fail_ranks({1, 100, 500}, [&](int, DeviceTransport& ring, Stream stream) {
    int out = 7, in = 0;
    const auto start = std::chrono::steady_clock::now();
    gate.put(stream);
    const Ticket ticket = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    until([&] { return std::chrono::steady_clock::now() - start > milliseconds(300); });
    until_watched(2);
    ring.wait(ticket, stream);
    gate.open();
    sync(stream);
    CHECK(in == 7);
    // And then it does count, also while NCCL itself is at work; there is nobody to ask.
    stub::set_progress(1 << 30);
    return failure_of([&] { ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream); });
  });
  check_all(failures, 0, Kind::kTimeout,
            "NCCL: exchange 3 (4 bytes to and 4 bytes from this rank), open for 0.");
}

TEST_CASE("a rank that cannot connect is named by all") {
  for (const char* function : {"ncclGetUniqueId", "ncclCommInitRankConfig"}) {
    CAPTURE(function);
    const CleanStubs clean;
    stub::fail_nccl(function, kInternal);
    Ports ports(3);
    std::vector<Failure> failures(3);
    in_parallel(3, [&](int rank) {
      failures[static_cast<std::size_t>(rank)] =
          failure_of([&] { join_nccl(ports, rank, nccl_options()); });
    });
    check_all(failures, failures[0].origin, Kind::kTransport,
              concat("NCCL 2.28.9: ", function, " failed: some error"));
  }
}

TEST_CASE("a rank that comes to the control ring only is named by all") {
  const CleanStubs clean;
  Ports ports(3);
  std::vector<Failure> failures(2);
  std::unique_ptr<Transport> control;
  auto idler = std::async(std::launch::async, [&] {
    control = ports.join(2, test_options(1, false, 1500));
    // Takes the id, and does no more.
    Buffer id(128);
    control->wait(control->exchange({}, {{0, id.data(), 128}}, 0), 0);
  });
  in_parallel(2, [&](int rank) {
    failures[static_cast<std::size_t>(rank)] =
        failure_of([&] { join_nccl(ports, rank, nccl_options(300), 1500); });
  });
  idler.get();
  check_all(failures, 2, Kind::kTimeout, "Rank 2 is alive but has not posted its side");
}

TEST_CASE("a caller can give up while it connects") {
  struct GivenUp {};
  const CleanStubs clean;
  Ports ports(2);
  auto other = std::async(std::launch::async,
                          [&] { return failure_of([&] { join_nccl(ports, 0, nccl_options()); }); });
  const auto control = ports.join(1, test_options());
  control->abort("gave up");
  const Failure failure = other.get();
  CHECK(failure.origin == 1);
  Ports alone(2);
  auto options = nccl_options();
  options.on_idle = [] { throw GivenUp{}; };
  auto joining = std::async(std::launch::async,
                            [&] { CHECK_THROWS_AS(join_nccl(alone, 0, options), GivenUp); });
  const auto second = alone.join(1, test_options());
  joining.get();
  CHECK(failure_of([&] {
          for (;;) second->wait(second->exchange({}, {}, 0), 0);
        }).origin == 0);
}

TEST_CASE("leaving with an exchange that nobody waits for fails the others") {
  const CleanStubs clean;
  Ports ports(2);
  in_parallel(2, [&](int rank) {
    const auto ring = join_nccl(ports, rank, nccl_options());
    const Stream stream = stub::make_stream();
    auto out = std::make_unique<Buffer>(100);
    if (rank == 0) {
      ring->exchange({{1, out->data(), 100}}, {}, stream);
      ring->close();
      out.reset();
    } else {
      const Failure failure = turn(1, 2, *ring, stream);
      CHECK(failure.origin == 0);
      CHECK(contains(failure.text, "it closed the ring with exchanges open: 1"));
    }
    ring->close();
    until([&] { return stub::drained(stream); });
    stub::destroy_stream(stream);
  });
  CHECK(stub::calls("ncclCommAbort") == 2);
}

TEST_CASE("a GPU that cannot be used is refused; a new ring works afterwards") {
  const CleanStubs clean;
  for (const char* function : {"cuDevicePrimaryCtxRetain", "cuStreamCreateWithPriority"}) {
    stub::fail(function, 700);
    Ports ports(1);
    CHECK_THROWS_WITH_AS(join_nccl(ports, 0, nccl_options()),
                         concat("GPU 0: ", function,
                                " failed with CUDA_ERROR_ILLEGAL_ADDRESS "
                                "(700).")
                             .c_str(),
                         UnsupportedError);
  }
  Ports ports(1);
  const auto ring = join_nccl(ports, 0, nccl_options());
  const Stream stream = stub::make_stream();
  int out = 5, in = 0;
  ring->wait(ring->exchange({{0, &out, 4}}, {{0, &in, 4}}, stream), stream);
  sync(stream);
  CHECK(in == 5);
  ring->close();
  stub::destroy_stream(stream);
}
