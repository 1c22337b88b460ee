// Calls of NCCL and of the driver that do not come back: they keep no other thread, and no rank.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <thread>
#include <vector>

#include "failing_nccl.h"

using namespace ringkern;
using Buffer = std::vector<std::uint8_t>;
using std::chrono::milliseconds;

namespace {

// Ranks whose kernels wait for messages that nobody sends, in a driver that does not answer until
// they have ended.
std::vector<Failure> fail_in_silence(const Options& options,
                                     const std::function<void(int, DeviceTransport&)>& then) {
  std::atomic<int> waiting{0};
  std::thread driver([&] {
    until([&] { return waiting == options.world_size; });
    stub::hold_queries(true);
    waiting = -1;
    until([&] { return stub::calls("ncclCommAbort") == options.world_size; });
    stub::hold_queries(false);
  });
  const auto failures = fail_ranks(options, [&](int rank, DeviceTransport& ring, Stream stream) {
    Buffer in(100);
    const int next = (rank + 1) % options.world_size;
    ring.exchange({}, {{next, in.data(), 100}}, stream);
    ++waiting;
    until([&] { return waiting == -1; });
    then(rank, ring);
    return failure_of([&] {
      for (;;) ring.exchange({}, {}, stream);
    });
  });
  driver.join();
  return failures;
}

}  // namespace

TEST_CASE("a caller that does not come back from NCCL keeps nobody else waiting") {
  const CleanStubs clean;
  Ports ports(1);
  const auto ring = join_nccl(ports, 0, nccl_options(300), 300);
  const Stream stream = stub::make_stream();
  int out = 1, in = 0;
  stub::hold("ncclGroupEnd");
  auto stuck = std::async(std::launch::async, [&] {
    return failure_of([&] { ring->exchange({{0, &out, 4}}, {{0, &in, 4}}, stream); });
  });
  until([] { return stub::calls("ncclGroupEnd") == 1; });
  const auto start = std::chrono::steady_clock::now();
  const Failure failure = failure_of([&] { ring->exchange({}, {}, stream); });
  CHECK(failure.kind == Kind::kTimeout);
  ring->close();
  CHECK(std::chrono::steady_clock::now() - start < milliseconds(3000));
  // Its buffers may still be used, and its communicator is left as it is.
  CHECK(ring->settled() == 1);
  CHECK(stub::calls("ncclCommAbort") == 0);
  stub::release();
  CHECK(stuck.get().text == failure.text);
  sync(stream);
  stub::destroy_stream(stream);
}

TEST_CASE("an abort that does not return keeps nobody waiting") {
  const CleanStubs clean;
  {
    Ports ports(1);
    const auto ring = join_nccl(ports, 0, nccl_options(200), 200);
    stub::hold("ncclCommAbort");
    const auto start = std::chrono::steady_clock::now();
    ring->abort("enough");
    CHECK(contains(failure_of([&] { ring->exchange({}, {}, 0); }).text, "enough"));
    ring->close();
    CHECK(std::chrono::steady_clock::now() - start < milliseconds(3000));
    CHECK(stub::contexts_retained() == 1);
  }
  stub::release();
  // The thread that was left behind gives back what it kept.
  until([] { return stub::contexts_retained() == 0; });
}

TEST_CASE("graphs that are alive keep the communicator, and nobody waiting") {
  const CleanStubs clean;
  for (const bool fails : {false, true}) {
    {
      Ports ports(1);
      const auto ring = join_nccl(ports, 0, nccl_options(fails ? 20000 : 300), 200);
      const Stream stream = stub::make_stream();
      int out = 1, in = 0;
      stub::begin_capture(stream);
      ring->wait(ring->exchange({{0, &out, 4}}, {{0, &in, 4}}, stream), stream);
      stub::end_capture(stream);
      const auto start = std::chrono::steady_clock::now();
      if (fails) ring->abort("enough");
      if (fails)
        CHECK(contains(failure_of([&] { ring->exchange({}, {}, stream); }).text, "enough"));
      CHECK(std::chrono::steady_clock::now() - start < milliseconds(3000));
      auto closing = std::async(std::launch::async, [&] { ring->close(); });
      until([&] { return stub::calls("ncclCommAbort") == (fails ? 2 : 1); });
      if (fails) stub::end_graphs();  // while it closes: then nothing is left behind
      closing.get();
      stub::destroy_stream(stream);
    }
    CHECK(stub::contexts_retained() == (fails ? 0 : 1));
    stub::end_graphs();
    until([] { return stub::contexts_retained() == 0; });
  }
}

TEST_CASE("a failure is told when the kernels of a graph's run have ended") {
  const CleanStubs clean;
  Ports ports(1);
  const auto ring = join_nccl(ports, 0, nccl_options());
  const Stream stream = stub::make_stream();
  const Gate gate;  // stands for exchanges in the graph
  const Ticket run = ring->begin_run(stream);
  gate.put(stream);
  ring->end_run(run, stream);
  std::atomic<bool> ended{false};
  auto told = std::async(std::launch::async, [&] {
    ring->abort("enough");
    return ended.load();
  });
  until([] { return stub::calls("ncclCommAbort") == 1; });
  const int before = stub::questions();
  until([&] { return stub::questions() > before + 4; });
  ended = true;
  gate.open();
  CHECK(told.get());
  sync(stream);
  stub::destroy_stream(stream);
}

TEST_CASE("a driver that does not answer ends the ring after its time") {
  const CleanStubs clean;
  const auto failures = fail_in_silence({3, 1500}, [](int, DeviceTransport&) {});
  // All drivers are silent: where two ranks say so in the same moment, both are an origin.
  for (const Failure& failure : failures) {
    CHECK(contains(failure.text, "CUDA: the driver has not answered for 1 s"));
    CHECK(failure.text.rfind(concat("rank ", failure.origin, " failed"), 0) == 0);
    const Failure& own = failures[static_cast<std::size_t>(failure.origin)];
    CHECK(own.origin == failure.origin);
    CHECK(own.kind == Kind::kTimeout);
  }
}

TEST_CASE("a driver that does not answer keeps no rank from what another one says") {
  const CleanStubs clean;
  const auto failures = fail_in_silence({3}, [](int rank, DeviceTransport& ring) {
    if (rank == 2) ring.abort("enough");
  });
  check_all(failures, 2, Kind::kTransport, "rank 2 of 3 was aborted: enough");
}
