// Rings over NCCL that work, on stubs of NCCL and of the driver.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <memory>
#include <vector>

#include "gpu_ranks.h"

using namespace ringkern;
using Buffer = std::vector<std::uint8_t>;

namespace {

int seed(int src, int dst, int round) { return 1000 * round + 31 * src + dst; }

// One message of this rank to and from every rank in `peers`; checks what came.
void exchange(Transport& ring, Stream stream, int rank, const std::vector<int>& peers,
              std::size_t nbytes, int round) {
  std::vector<Buffer> out, in(peers.size(), Buffer(nbytes));
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  for (const int peer : peers) out.push_back(pattern(nbytes, seed(rank, peer, round)));
  for (std::size_t i = 0; i < peers.size(); ++i) {
    sends.push_back({peers[i], out[i].data(), nbytes});
    recvs.push_back({peers[i], in[i].data(), nbytes});
  }
  const Ticket ticket = ring.exchange(sends, recvs, stream);
  CHECK(ring.poll(ticket, std::chrono::milliseconds(0)));
  CHECK(ring.wait(ticket, stream).posted_ns > 0);
  sync(stream);
  for (std::size_t i = 0; i < peers.size(); ++i) {
    REQUIRE(in[i] == pattern(nbytes, seed(peers[i], rank, round)));
  }
}

// In place: the address has been posted.
void fill(Buffer& buffer, int seed) {
  const Buffer bytes = pattern(buffer.size(), seed);
  std::copy(bytes.begin(), bytes.end(), buffer.begin());
}

bool refuses(const std::function<void()>& action, const std::string& words) {
  try {
    action();
  } catch (const ArgumentError& error) {
    return contains(error.what(), words);
  }
  return false;
}

}  // namespace

TEST_CASE("messages between all ranks, and to oneself, at every world size") {
  for (const int world_size : {1, 2, 3, 5}) {
    for (const int progress : {0, 3}) {
      CAPTURE(world_size);
      CAPTURE(progress);
      run_nccl(world_size, nccl_options(), [&](int rank, DeviceTransport& ring, Stream stream) {
        if (rank == 0) stub::set_progress(progress);
        std::vector<int> all;
        for (int peer = 0; peer < world_size; ++peer) all.push_back(peer);
        int round = 0;
        for (const std::size_t nbytes : {0, 1, 8, 4095, 100003}) {
          exchange(ring, stream, rank, all, nbytes, round++);
        }
        const Stats stats = ring.stats();
        const auto ranks = static_cast<std::size_t>(world_size);
        CHECK(stats.bytes_sent == std::vector<std::uint64_t>(ranks, 104107));
        CHECK(stats.bytes_received == stats.bytes_sent);
        CHECK(stats.messages_sent == 5 * ranks);
        CHECK(stats.messages_received == 5 * ranks);
      });
    }
  }
}

TEST_CASE("an exchange begins behind the caller's work, and what follows is behind it") {
  const Gate gate;
  std::atomic<bool> posted{false};
  run_nccl(2, nccl_options(), [&](int rank, DeviceTransport& ring, Stream stream) {
    const int peer = 1 - rank;
    Buffer out(8), in(8, 0xee), used(8);
    if (rank == 0) gate.put(stream);
    put_work(stream, [&] { fill(out, rank); });
    const Ticket ticket = ring.exchange({{peer, out.data(), 8}}, {{peer, in.data(), 8}}, stream);
    const Stream other = stub::make_stream();
    ring.wait(ticket, stream);
    put_work(stream, [&] { used = in; });
    put_work(other, [] {});
    sync(other);  // is not held
    if (rank == 0) {
      until_watched(4);
      CHECK(in == Buffer(8, 0xee));
      CHECK_FALSE(stub::drained(stream));
      posted = true;
    } else {
      until([&] { return posted.load(); });
      CHECK(used == Buffer(8));
      gate.open();
    }
    sync(stream);
    CHECK(used == pattern(8, peer));
    stub::destroy_stream(other);
  });
}

TEST_CASE("buffers are settled when the GPU has done with them, waited for or not") {
  for (const bool waits : {false, true}) {
    CAPTURE(waits);
    const Gate gate;
    run_nccl(2, nccl_options(), [&](int rank, DeviceTransport& ring, Stream stream) {
      const int peer = 1 - rank;
      // Freed as soon as the ring says so: AddressSanitizer sees a copy that comes later.
      auto out = std::make_unique<Buffer>(pattern(100, rank));
      auto in = std::make_unique<Buffer>(100);
      if (rank == 1) gate.put(stream);
      const Ticket first =
          ring.exchange({{peer, out->data(), 100}}, {{peer, in->data(), 100}}, stream);
      if (waits) ring.wait(first, stream);
      const Ticket empty = ring.exchange({}, {}, stream);
      CHECK(empty == first + 1);
      CHECK(ring.settled() == first - 1);
      if (rank == 0) {
        until_watched(4);
        CHECK(ring.settled() == first - 1);
        gate.open();
      }
      until([&] { return ring.settled() == empty; });
      CHECK(*in == pattern(100, peer));
      out.reset();
      in.reset();
      const Times times = ring.wait(empty, stream);
      CHECK(times.done_ns == times.posted_ns);
      if (waits) return;
      // Its times are known by now, and it holds nothing.
      const Times known = ring.wait(first, stream);
      CHECK(known.done_ns >= known.posted_ns);
      CHECK(stub::drained(stream));
    });
  }
}

TEST_CASE("a ticket is waited for once") {
  run_nccl(1, nccl_options(), [](int, DeviceTransport& ring, Stream stream) {
    const Gate gate;
    gate.put(stream);
    int out = 1, in = 0;
    const Ticket ticket = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    CHECK(ring.wait(ticket, stream).done_ns == 0);
    CHECK(refuses([&] { ring.wait(ticket, stream); }, "ticket: want one that exchange() gave"));
    CHECK(refuses([&] { ring.wait(ticket + 1, stream); }, "got 3"));
    gate.open();
    sync(stream);
    until([&] { return ring.settled() == ticket; });
    CHECK(refuses([&] { ring.wait(ticket, stream); }, "nobody waited for"));
  });
}

TEST_CASE("a caller that is far ahead of the GPU is held") {
  run_nccl(1, nccl_options(), [](int, DeviceTransport& ring, Stream stream) {
    const Gate gate;
    gate.put(stream);
    int out = 1, in = 0;
    std::atomic<int> posted{0};
    auto poster = std::async(std::launch::async, [&] {
      for (; posted < 600; ++posted) ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    });
    until([&] { return posted == 256; });
    until_watched(4);
    CHECK(posted == 256);
    gate.open();
    poster.get();
    sync(stream);
    CHECK(in == 1);
    until([&] { return ring.settled() == 601; });  // the first ticket was for connecting
    CHECK(stub::events_alive() <= 2 * 257);
  });
}

TEST_CASE("an exchange in a graph runs with every replay") {
  run_nccl(2, nccl_options(), [](int rank, DeviceTransport& ring, Stream stream) {
    const int peer = 1 - rank;
    Buffer out = pattern(100, rank), in(100);
    static std::atomic<int> captured{0};
    stub::begin_capture(stream);
    const Ticket ticket =
        ring.exchange({{peer, out.data(), 100}}, {{peer, in.data(), 100}}, stream);
    CHECK(ring.settled() == ticket - 1);
    CHECK(ring.wait(ticket, stream).done_ns == 0);
    CHECK(ring.settled() == ticket);
    CHECK_THROWS_WITH_AS(ring.begin_run(stream), doctest::Contains("got one that captures"),
                         UnsupportedError);
    ++captured;
    until([] { return captured == 2; });
    until_watched(4);
    static std::vector<stub::MakeWork> graph;
    static std::atomic<int> taken{0};
    if (rank == 0) graph = stub::end_capture(stream);  // of both ranks
    ++taken;
    until([] { return taken == 2; });
    CHECK(graph.size() == 2);
    CHECK(in == Buffer(100));
    static std::atomic<int> round{0};
    for (int replay = 0; replay < 2; ++replay) {
      fill(out, 10 * replay + rank);
      ++round;
      until([&] { return round >= 4 * replay + 2; });
      if (rank == 0) stub::run_graph({graph[0]}, stream);
      if (rank == 1) stub::run_graph({graph[1]}, stream);
      sync(stream);
      ++round;
      until([&] { return round >= 4 * replay + 4; });
      CHECK(in == pattern(100, 10 * replay + peer));
    }
    exchange(ring, stream, rank, {peer}, 1000, 1);
    stub::end_graphs();
  });
}

TEST_CASE("an exchange from outside is not waited for in a capture") {
  run_nccl(1, nccl_options(), [](int, DeviceTransport& ring, Stream stream) {
    const Gate gate;
    gate.put(stream);
    int out = 1, in = 0;
    const Ticket ticket = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    const Stream other = stub::make_stream();
    stub::begin_capture(other);
    CHECK_THROWS_WITH_AS(ring.wait(ticket, other), doctest::Contains("of the same capture, got 2"),
                         UnsupportedError);
    CHECK(stub::end_capture(other).empty());
    ring.wait(ticket, other);
    gate.open();
    sync(other);
    CHECK(in == 1);
    stub::destroy_stream(other);
  });
}

TEST_CASE("a capture that was given up keeps no buffers") {
  run_nccl(1, nccl_options(), [](int, DeviceTransport& ring, Stream stream) {
    int out = 1, in = 0;
    stub::begin_capture(stream);
    const Ticket dropped = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    stub::end_capture(stream);
    stub::end_graphs();
    CHECK(ring.settled() < dropped);
    const Ticket ticket = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    ring.wait(ticket, stream);
    until([&] { return ring.settled() == ticket; });
    CHECK_THROWS_AS(ring.wait(dropped, stream), ArgumentError);
  });
}

TEST_CASE("exchanges in flight are watched while a thread captures something else") {
  run_nccl(1, nccl_options(), [](int, DeviceTransport& ring, Stream stream) {
    const Stream other = stub::make_stream();
    const Gate gate;
    gate.put(stream);
    int out = 1, in = 0;
    const Ticket ticket = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    stub::begin_capture(other);
    until_watched(4);
    CHECK(ring.settled() < ticket);
    stub::end_capture(other);
    gate.open();
    until([&] { return ring.settled() == ticket; });
    stub::destroy_stream(other);
  });
}

TEST_CASE("while one stream captures, an exchange on another is refused and the ring goes on") {
  run_nccl(1, nccl_options(), [](int rank, DeviceTransport& ring, Stream stream) {
    const Stream other = stub::make_stream();
    int out = 1, in = 0;
    stub::begin_capture(stream);
    const Ticket ticket = ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, stream);
    const std::vector<Send> sends{{0, &out, 4}};
    const std::vector<Recv> recvs{{0, &in, 4}};
    CHECK_THROWS_WITH_AS(ring.exchange(sends, recvs, other),
                         doctest::Contains("while another thread captures"), UnsupportedError);
    ring.wait(ticket, stream);
    stub::end_capture(stream);
    exchange(ring, other, rank, {0}, 100, 0);
    stub::end_graphs();
    stub::destroy_stream(other);
  });
}

TEST_CASE("what cannot be posted is refused before anything is") {
  run_nccl(2, nccl_options(), [](int rank, DeviceTransport& ring, Stream stream) {
    int word = 0;
    const auto sent = [&](int peer, void* data, std::size_t nbytes, Stream on) {
      ring.exchange({{peer, data, nbytes}}, {}, on);
    };
    CHECK(refuses([&] { sent(2, &word, 4, stream); }, "send: want a peer from 0 to 1, got 2."));
    CHECK(refuses([&] { sent(-1, &word, 4, stream); }, "got -1."));
    CHECK(refuses([&] { sent(1 - rank, nullptr, 4, stream); }, "got null for 4 bytes."));
    CHECK(refuses([&] { ring.exchange({}, {{1 - rank, nullptr, 4}}, stream); }, "recv: want a po"));
    CHECK(refuses([&] { sent(rank, &word, 4, stream); },
                  "messages to this rank itself: want receives of the bytes that are sent, 4, got "
                  "none."));
    CHECK(refuses([&] { ring.exchange({}, {{rank, &word, 4}}, stream); }, "sent, none, got 4."));
    CHECK(refuses([&] { sent(1 - rank, &word, 4, 12345); },
                  "stream: want a stream of GPU 0, got 12345: cuStreamIsCapturing failed with "
                  "CUDA_ERROR_INVALID_HANDLE (400)."));
    CHECK(stub::messages(rank).empty());
    exchange(ring, stream, rank, {1 - rank}, 100, 0);
    Buffer out(1), in(1);
    const Ticket ticket = ring.exchange({{rank, out.data(), 1}}, {{rank, in.data(), 1}}, stream);
    CHECK(refuses([&] { ring.wait(ticket, 12345); }, "stream: want a stream of GPU 0, got 12345"));
    ring.wait(ticket, stream);
    exchange(ring, stream, rank, {1 - rank}, 100, 1);
    sync(stream);
  });
}

TEST_CASE("leaving lets exchanges end for which a stream waits") {
  const Gate gate;
  run_nccl(2, nccl_options(), [&](int rank, DeviceTransport& ring, Stream stream) {
    const int peer = 1 - rank;
    Buffer out = pattern(100, rank), in(100);
    if (rank == 1) gate.put(stream);
    ring.wait(ring.exchange({{peer, out.data(), 100}}, {{peer, in.data(), 100}}, stream), stream);
    if (rank == 0) {
      auto closing = std::async(std::launch::async, [&] { ring.close(); });
      until_watched(10);
      CHECK(stub::calls("ncclCommFinalize") == 0);
      gate.open();
      closing.get();
    }
    sync(stream);
    CHECK(in == pattern(100, peer));
    ring.close();
    ring.close();
    const Failure failure = failure_of([&] { ring.exchange({}, {}, stream); });
    CHECK(failure.text == concat("rank ", rank, " of 2 has closed this ring"));
    CHECK(failure.origin == rank);
    CHECK(ring.poll(1, std::chrono::milliseconds(0)));
    CHECK(ring.settled() == 2);
    CHECK(stub::calls("ncclCommAbort") == 0);
  });
  CHECK(stub::calls("ncclCommFinalize") == 2);
  CHECK(stub::calls("ncclCommDestroy") == 2);
}

TEST_CASE("a flush that fails or takes too long becomes an abort") {
  for (const bool fails : {false, true}) {
    run_nccl(1, nccl_options(300), [&](int, DeviceTransport& ring, Stream) {
      if (fails) stub::fail_nccl("ncclCommFinalize", 3);
      if (!fails) stub::set_progress(1 << 30);
      ring.close();
      CHECK(stub::calls("ncclCommDestroy") == 0);
      CHECK(stub::calls("ncclCommAbort") == 1);
    });
  }
}

TEST_CASE("a ring from before fork() is refused in the child, and left alone") {
  run_nccl(1, nccl_options(), [](int rank, DeviceTransport& ring, Stream stream) {
    const pid_t child = ::fork();
    if (child == 0) {
      bool refused = false;
      try {
        ring.exchange({}, {}, stream);
      } catch (const TransportError& error) {
        refused = std::string(error.what()).find("made before fork()") != std::string::npos;
      }
      ring.~DeviceTransport();
      ::_exit(refused ? 0 : 1);
    }
    int status = 1;
    ::waitpid(child, &status, 0);
    CHECK(status == 0);
    exchange(ring, stream, rank, {0}, 100, 0);
  });
}
