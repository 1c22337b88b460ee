// What a communicator is made with: ringkern's options, and what NCCL makes of its configuration.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdlib>
#include <functional>

#include "gpu_ranks.h"

using namespace ringkern;

TEST_CASE("the communicator does not block, its stream goes first, its options arrive") {
  NcclOptions options = nccl_options();
  options.min_ctas = 2;
  options.max_ctas = 8;
  options.channels_per_net_peer = 4;
  run_nccl(2, options, [](int rank, DeviceTransport&, Stream) {
    const stub::Config config = stub::config(rank);
    CHECK(config.size == sizeof(NcclConfig));
    CHECK(config.magic == 0xcafebeef);
    CHECK(config.version == 22803);
    CHECK(config.blocking == 0);
    CHECK(config.min_ctas == 2);
    CHECK(config.max_ctas == 8);
    CHECK(config.channels_per_net_peer == 4);
    CHECK(config.nvlink_centric_sched == NcclConfig::kUndefined);
    CHECK(stub::latest_priority() == -5);
    CHECK(stub::latest_flags() == 1);
  });
  run_nccl(1, nccl_options(), [](int rank, DeviceTransport&, Stream) {
    CHECK(stub::config(rank).min_ctas == NcclConfig::kUndefined);
    CHECK(stub::config(rank).max_ctas == NcclConfig::kUndefined);
    CHECK(stub::config(rank).channels_per_net_peer == NcclConfig::kUndefined);
  });
}

TEST_CASE("a minimum of CTAs alone has a maximum, as NCCL wants it") {
  NcclOptions options = nccl_options();
  options.min_ctas = 2;
  run_nccl(1, options, [](int rank, DeviceTransport&, Stream) {
    CHECK(stub::config(rank).min_ctas == 2);
    CHECK(stub::config(rank).max_ctas == 64);
  });
}

TEST_CASE("an NCCL that is told to block is refused") {
  const CleanStubs clean;
  Ports refused(1), taken(1);
  ::setenv("NCCL_COMM_BLOCKING", "1", 1);
  CHECK_THROWS_WITH_AS(join_nccl(refused, 0, nccl_options()),
                       doctest::Contains("NCCL_COMM_BLOCKING: want 0 or none, got \"1\""),
                       UnsupportedError);
  ::setenv("NCCL_COMM_BLOCKING", "0", 1);
  join_nccl(taken, 0, nccl_options())->close();
  ::unsetenv("NCCL_COMM_BLOCKING");
}

TEST_CASE("an older NCCL gets its own version, and refuses what it does not know") {
  const CleanStubs clean;
  stub::set_version(22705);
  Ports ports(1);
  auto options = nccl_options();
  options.channels_per_net_peer = 4;
  CHECK_THROWS_WITH_AS(join_nccl(ports, 0, options),
                       "channels_per_net_peer: want NCCL 2.28.3 or later, got 2.27.5. Unset "
                       "RINGKERN_NCCL_CHANNELS.",
                       UnsupportedError);
  Ports others(1);
  const auto ring = join_nccl(others, 0, nccl_options());
  CHECK(stub::config(0).version == 22705);
}

TEST_CASE("options out of range are refused") {
  const auto check_refused = [](const std::function<void(NcclOptions&)>& spoil, const char* words) {
    const CleanStubs clean;
    Ports ports(1);
    auto options = nccl_options();
    spoil(options);
    CHECK_THROWS_WITH_AS(join_nccl(ports, 0, options), doctest::Contains(words), ArgumentError);
  };
  check_refused([](auto& o) { o.min_ctas = -1; }, "min_ctas: want 0 to 64, got -1.");
  check_refused([](auto& o) { o.max_ctas = 65; }, "max_ctas: want 0 to 64, got 65.");
  check_refused([](auto& o) { o.min_ctas = 9, o.max_ctas = 8; }, "min_ctas: want at most max_");
  check_refused([](auto& o) { o.channels_per_net_peer = -1; }, "channels_per_net_peer: want 0");
  check_refused([](auto& o) { o.timeout = {}; }, "timeout: want more than 0 ms, got 0.");
}
