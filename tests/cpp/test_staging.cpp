// Rings for a GPU's memory over TCP that work, on a stub of the driver: what arrives, what callers
// are told and refused.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <future>
#include <memory>
#include <vector>

#include "loop.h"
#include "staged_ranks.h"

using namespace ringkern;
using std::chrono::milliseconds;

TEST_CASE("messages between all ranks, and to oneself, at every world size") {
  for (const int world_size : {1, 2, 3, 5}) {
    CAPTURE(world_size);
    run_staged(world_size, staging_options(), [&](const StagedRank& it) {
      std::vector<int> all;
      for (int peer = 0; peer < world_size; ++peer) all.push_back(peer);
      int round = 0;
      for (const std::size_t nbytes : {0, 1, 63, 64, 65, 128, 4095, 10007}) {
        swap(it, all, nbytes, round++);
      }
      const Stats stats = it.ring.stats();
      const auto ranks = static_cast<std::size_t>(world_size);
      CHECK(stats.bytes_sent == std::vector<std::uint64_t>(ranks, 14423));
      CHECK(stats.bytes_received == stats.bytes_sent);
      CHECK(stats.messages_sent == 8 * ranks);
      CHECK(stats.messages_received == 8 * ranks);
      // A peer has so many slots in each direction, however large the messages are.
      CHECK(stub::pinned_alive() <= 2 * 2 * world_size * (world_size - 1));
    });
  }
}

TEST_CASE("slots of every number and size, messages much larger than all of them, both ways") {
  struct Case {
    std::size_t slot_bytes;
    int slots;
    std::size_t nbytes;
  };
  for (const Case& c : {Case{1, 2, 300}, Case{1, 64, 300}, Case{7, 3, 5000}, Case{4096, 4, 1 << 20},
                        Case{std::size_t{1} << 20, 4, (std::size_t{6} << 20) + 3}}) {
    CAPTURE(c.slot_bytes);
    CAPTURE(c.slots);
    run_staged(2, staging_options(c.slot_bytes, c.slots), [&](const StagedRank& it) {
      Messages first(it, {1 - it.rank}, c.nbytes, 0);
      Messages second(it, {1 - it.rank, 1 - it.rank}, c.nbytes + 1, 1);
      second.finish();
      first.finish();
    });
  }
}

TEST_CASE("the default is slots of 1 MiB") {
  CHECK(StagingOptions().slot_bytes == 1 << 20);
  run_staged(2, StagingOptions(), [](const StagedRank& it) {
    swap(it, {1 - it.rank}, (std::size_t{2} << 20) + 5, 0);
    CHECK(it.wire.sent() == std::vector<std::size_t>{1 << 20, 1 << 20, 5});
  });
}

TEST_CASE("the last piece of a message is the one that is not full") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    int round = 0;
    for (const std::size_t nbytes : {0, 63, 64, 130, 192}) {
      swap(it, {1 - it.rank}, nbytes, round++);
    }
    CHECK(it.wire.sent() == std::vector<std::size_t>{0, 63, 64, 0, 64, 64, 2, 64, 64, 64, 0});
  });
}

TEST_CASE("ranks that draw exchanges at random agree on every byte") {
  for (const int world_size : {2, 3, 5}) {
    run_staged(world_size, staging_options(16, 3), [&](const StagedRank& it) {
      std::vector<std::unique_ptr<Messages>> open;
      std::uint32_t state = 7;  // the same on all ranks
      const auto draw = [&](std::uint32_t below) {
        state = state * 1664525u + 1013904223u;
        return static_cast<int>((state >> 8) % below);
      };
      for (int round = 0; round < 60; ++round) {
        const int first = draw(static_cast<std::uint32_t>(world_size)), nbytes = draw(200);
        const int second = draw(static_cast<std::uint32_t>(world_size)), finish = draw(3);
        if (it.rank == first || it.rank == second) {
          const int peer = it.rank == first ? second : first;
          open.push_back(
              std::make_unique<Messages>(it, std::vector<int>{peer, peer}, nbytes, 2 * round));
        }
        if (finish == 0 && !open.empty()) {
          open.back()->finish();
          open.pop_back();
        }
      }
      for (auto& messages : open) messages->finish();
    });
  }
}

TEST_CASE("to oneself the GPU copies, and no caller waits for that") {
  for (const int world_size : {1, 2}) {
    run_staged(world_size, staging_options(), [](const StagedRank& it) {
      const Gate gate;
      gate.put(it.stream);
      Buffer out(1000), in(1000), same = pattern(10, 3);
      put_work(it.stream, [&] { fill(out, it.rank); });
      const std::vector<Send> sends{{it.rank, out.data(), 1000}, {it.rank, same.data(), 10}};
      const std::vector<Recv> recvs{{it.rank, in.data(), 1000}, {it.rank, same.data(), 10}};
      const Ticket ticket = it.ring.exchange(sends, recvs, it.stream);
      CHECK(it.ring.poll(ticket, milliseconds(0)));
      CHECK(it.ring.wait(ticket, it.stream).done_ns == 0);
      CHECK_FALSE(stub::drained(it.stream));
      CHECK(in == Buffer(1000));
      CHECK(it.ring.settled() < ticket);
      gate.open();
      sync(it.stream);
      CHECK(in == pattern(1000, it.rank));
      CHECK(same == pattern(10, 3));
      CHECK(it.ring.settled() == ticket);
      CHECK(it.wire.posted() == 0);
      CHECK(times("DtoD done", in) == 1);
      CHECK(times("DtoD done", same) == 0);
    });
  }
}

TEST_CASE("an exchange with others and oneself is done when all of its copies are") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    if (it.rank == 0) stub::let_copies("DtoD", 0);
    it.meet();
    Messages messages(it, {0, 1}, 100, 0);
    it.ring.wait(messages.ticket, it.stream);
    until([&] {
      return times("HtoD done", messages.in[static_cast<std::size_t>(1 - it.rank)]) == 2;
    });
    CHECK_FALSE(stub::drained(it.stream));
    CHECK(it.ring.settled() < messages.ticket);
    it.meet();
    stub::let_copies("DtoD", -1);
    sync(it.stream);
    CHECK(messages.in[static_cast<std::size_t>(it.rank)] ==
          pattern(100, seed(it.rank, it.rank, 0)));
    CHECK(it.ring.settled() == messages.ticket);
  });
}

TEST_CASE("buffers are settled when the GPU has done with them, waited for or not") {
  for (const bool waits : {false, true}) {
    CAPTURE(waits);
    run_staged(2, staging_options(), [&](const StagedRank& it) {
      // Freed as soon as the ring says so: AddressSanitizer sees a copy that comes later.
      auto messages = std::make_unique<Messages>(it, std::vector<int>{1 - it.rank}, 1000, 0);
      const Ticket first = messages->ticket;
      if (waits) it.ring.wait(first, it.stream);
      const Ticket empty = it.ring.exchange({}, {}, it.stream);
      CHECK(empty == first + 1);
      until([&] { return it.ring.settled() == empty; });
      CHECK(messages->in[0] == pattern(1000, seed(1 - it.rank, it.rank, 0)));
      messages.reset();
      const Times known = it.ring.wait(empty, it.stream);
      CHECK(known.done_ns == known.posted_ns);
      if (!waits) CHECK(it.ring.wait(first, it.stream).done_ns > 0);
      CHECK(stub::drained(it.stream));
    });
  }
}

TEST_CASE("nothing is settled while a copy to the GPU is still to come") {
  run_staged(2, staging_options(64, 4), [&](const StagedRank& it) {
    stub::let_copies("HtoD", 0);
    Messages messages(it, {1 - it.rank}, 100, 0);
    it.ring.wait(messages.ticket, it.stream);  // is for the stream, not for the caller
    bool used = false;
    put_work(it.stream,
             [&] { used = messages.in[0] == pattern(100, seed(1 - it.rank, it.rank, 0)); });
    it.meet();
    CHECK_FALSE(stub::drained(it.stream));
    CHECK(it.ring.settled() == messages.ticket - 1);
    CHECK(messages.in[0] == Buffer(100));
    it.meet();
    stub::let_copies("HtoD", -1);
    sync(it.stream);
    CHECK(used);
    until([&] { return it.ring.settled() == messages.ticket; });
  });
}

TEST_CASE("times are when it was posted and when the last byte was through") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    const auto now = [] { return Clock::now().time_since_epoch().count(); };
    const auto before = now();
    Messages messages(it, {1 - it.rank}, 1000, 0);
    messages.finish();
    CHECK(before <= messages.times.posted_ns);
    CHECK(messages.times.posted_ns < messages.times.done_ns);
    CHECK(messages.times.done_ns <= now());
  });
}

TEST_CASE("a ticket is waited for once") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    Messages messages(it, {1 - it.rank}, 10, 0);
    messages.finish();
    CHECK(it.ring.poll(messages.ticket, milliseconds(0)));
    CHECK(refuses([&] { it.ring.wait(messages.ticket, it.stream); },
                  "ticket: want one that exchange() gave and nobody waited for, got 1."));
    CHECK(refuses([&] { it.ring.wait(7, it.stream); }, "got 7."));
  });
}

TEST_CASE("a stream that captures a graph is refused, and captures on") {
  run_staged(1, staging_options(), [](const StagedRank& it) {
    const CallerStream own;
    const Stream other = own.handle;
    int out = 3, in = 0;
    const Ticket ticket = it.ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, it.stream);
    stub::begin_capture(other);
    const char* const words =
        "an exchange in a CUDA graph: want a ring over NCCL, got one over TCP, where the CPU moves "
        "each piece. Use NCCL, or exchange outside of the graph.";
    CHECK_THROWS_WITH_AS(it.ring.exchange({{0, &out, 4}}, {{0, &in, 4}}, other), words,
                         UnsupportedError);
    CHECK_THROWS_WITH_AS(it.ring.wait(ticket, other), words, UnsupportedError);
    put_work(other, [] {});
    CHECK(stub::end_capture(other).size() == 1);
    it.ring.wait(ticket, other);
    sync(other);
    CHECK(in == 3);
    CHECK(it.ring.settled() == ticket);
  });
}

TEST_CASE("exchanges go on while a thread captures something else") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    const CallerStream own;
    const Stream other = own.handle;
    if (it.rank == 0) stub::begin_capture(other);
    it.meet();
    swap(it, {1 - it.rank}, 1000, 0);
    it.meet();
    if (it.rank == 0) stub::end_capture(other);
  });
}

TEST_CASE("what cannot be posted is refused before anything is") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    int word = 0;
    const int rank = it.rank;
    const auto sent = [&](int peer, void* data, std::size_t nbytes, Stream on) {
      it.ring.exchange({{peer, data, nbytes}}, {}, on);
    };
    CHECK(refuses([&] { sent(2, &word, 4, it.stream); }, "send: want a peer from 0 to 1, got 2."));
    CHECK(refuses([&] { sent(-1, &word, 4, it.stream); }, "got -1."));
    CHECK(refuses([&] { sent(1 - rank, nullptr, 4, it.stream); }, "got null for 4 bytes."));
    CHECK(
        refuses([&] { it.ring.exchange({}, {{1 - rank, nullptr, 4}}, it.stream); }, "recv: want"));
    CHECK(refuses([&] { sent(rank, &word, 4, it.stream); },
                  "messages to this rank itself: want receives of the bytes that are sent, 4, got "
                  "none."));
    CHECK(refuses([&] { it.ring.exchange({}, {{rank, &word, 4}}, it.stream); }, "none, got 4."));
    CHECK(refuses([&] { sent(1 - rank, &word, 4, 12345); },
                  "stream: want a stream of GPU 0, got 12345: cuStreamIsCapturing failed with "
                  "CUDA_ERROR_INVALID_HANDLE (400)."));
    CHECK(it.wire.posted() == 0);
    Messages messages(it, {1 - rank}, 1, 0);
    CHECK(refuses([&] { it.ring.wait(messages.ticket, 12345); }, "stream: want a stream of GPU 0"));
    messages.finish();
  });
}

TEST_CASE("options and arguments out of range are refused") {
  const auto refused = [](const std::function<void(StagingOptions&, int&)>& spoil,
                          const char* words) {
    const CleanStaged clean;
    Ports ports(1);
    StagingOptions options;
    int device = 0;
    spoil(options, device);
    return refuses(
        [&] { make_staged(ports.join(0, test_options()), 0, 1, Driver::open(), device, options); },
        words);
  };
  CHECK(
      refused([](auto& o, int&) { o.slot_bytes = 0; }, "slot_bytes: want 1 to 1073741824, got 0"));
  CHECK(refused([](auto& o, int&) { o.slots = 1; }, "slots: want 2 to 64, got 1."));
  CHECK(refused([](auto& o, int&) { o.slots = 65; }, "slots: want 2 to 64, got 65."));
  CHECK(refused([](auto& o, int&) { o.grace = {}; }, "grace: want more than 0 ms, got 0."));
  CHECK(refused([](auto&, int& device) { device = 2; }, "device: want a GPU from 0 to 1, as this"));
  CHECK(refuses([] { make_staged(nullptr, 0, 1, nullptr, 0); }, "wire: want a ring, got none."));
}

TEST_CASE("copies have streams of their own, ahead of others where the GPU has a choice") {
  run_staged(1, staging_options(), [](const StagedRank&) {
    CHECK(stub::streams_alive() == 4);
    CHECK(stub::latest_priority() == -5);
    CHECK(stub::latest_flags() == 1);
  });
}

TEST_CASE("runs of graphs are refused") {
  run_staged(1, staging_options(), [](const StagedRank& it) {
    CHECK_THROWS_AS(it.ring.begin_run(it.stream), UnsupportedError);
  });
}

TEST_CASE("leaving lets copies end for which a stream waits") {
  run_staged(2, staging_options(64, 4), [&](const StagedRank& it) {
    stub::let_copies("HtoD", 0);
    Messages messages(it, {1 - it.rank}, 100, 0);
    it.ring.wait(messages.ticket, it.stream);
    it.meet();
    auto closing = std::async(std::launch::async, [&] { it.ring.close(); });
    it.meet();
    CHECK(closing.wait_for(milliseconds(20)) == std::future_status::timeout);
    it.meet();
    stub::let_copies("HtoD", -1);
    closing.get();
    sync(it.stream);
    CHECK(messages.in[0] == pattern(100, seed(1 - it.rank, it.rank, 0)));
    it.ring.close();
    const Failure failure = failure_of([&] { it.ring.exchange({}, {}, it.stream); });
    CHECK(failure.text == concat("rank ", it.rank, " of 2 has closed this ring"));
    CHECK(failure.origin == it.rank);
    CHECK(failure_of([&] { it.ring.wait(1, it.stream); }).text == failure.text);
    CHECK(failure_of([&] { it.ring.host().exchange({}, {}, 0); }).origin == it.rank);
    CHECK(it.ring.poll(1, milliseconds(0)));
    CHECK(it.ring.settled() == 1);
    CHECK(it.ring.stats().messages_sent == 1);
  });
}

TEST_CASE("a ring from before fork() is refused in the child, and left alone") {
  run_staged(1, staging_options(), [](const StagedRank& it) {
    const pid_t child = ::fork();
    if (child == 0) {
      int refused = 0;
      const auto refuses = [&](const std::function<void()>& call) {
        try {
          call();
        } catch (const TransportError& error) {
          refused += std::string(error.what()).find("made before fork()") != std::string::npos;
        }
      };
      refuses([&] { it.ring.exchange({}, {}, it.stream); });
      refuses([&] { it.ring.wait(1, it.stream); });
      refuses([&] { it.ring.close(); });
      refuses([&] { it.ring.host(); });
      it.ring.~DeviceTransport();
      ::_exit(refused == 4 ? 0 : 1);
    }
    int status = 1;
    ::waitpid(child, &status, 0);
    CHECK(status == 0);
    swap(it, {0}, 100, 0);
  });
}
