#include "nccl.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "nccl_core.h"
#include "owner.h"

namespace ringkern {
namespace {

constexpr int kMostCtas = 64;

// The Transport that callers see: checks what they pass, and that the process is still the one
// that made it.
class Nccl : public DeviceTransport {
 public:
  Nccl(std::shared_ptr<NcclCore> core, int rank, int world_size)
      : owner_{rank, world_size}, core_(std::move(core)) {}

  ~Nccl() override {
    if (owner_.is_this_process()) {
      core_->close();
    } else {
      static_cast<void>(new std::shared_ptr<NcclCore>(std::move(core_)));
    }
  }

  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                  Stream stream) override {
    owner_.check_process();
    owner_.check_entries(sends, recvs);
    return core_->exchange(sends, recvs, stream);
  }
  bool poll(Ticket ticket, std::chrono::milliseconds slice) override {
    static_cast<void>(ticket);  // whichever: wait() does not wait for the GPU
    return core().poll(slice);
  }
  Times wait(Ticket ticket, Stream stream) override { return core().wait(ticket, stream); }
  void abort(const std::string& reason) override { core().abort(reason); }
  void close() override { core().close(); }
  Stats stats() const override { return core().stats(); }
  Ticket settled() override { return core().settled(); }
  Ticket begin_run(Stream stream) override { return core().begin_run(stream); }
  void end_run(Ticket ticket, Stream stream) override { core().end_run(ticket, stream); }
  Transport& host() override { return core().control(); }

 private:
  NcclCore& core() const {
    owner_.check_process();
    return *core_;
  }

  const Owner owner_;
  std::shared_ptr<NcclCore> core_;
};

NcclConfig make_config(const NcclLibrary& nccl, const NcclOptions& options) {
  const auto most = concat("0 to ", kMostCtas);
  const auto in_range = [](int value) { return value >= 0 && value <= kMostCtas; };
  check(in_range(options.min_ctas), "min_ctas", most, options.min_ctas);
  check(in_range(options.max_ctas), "max_ctas", most, options.max_ctas);
  check(options.max_ctas == 0 || options.min_ctas <= options.max_ctas, "min_ctas",
        concat("at most max_ctas, ", options.max_ctas), options.min_ctas);
  check(in_range(options.channels_per_net_peer), "channels_per_net_peer", most,
        options.channels_per_net_peer);
  if (options.channels_per_net_peer > 0 && nccl.version < NcclLibrary::kChannelsPerNetPeer) {
    throw UnsupportedError(concat(
        "channels_per_net_peer: want NCCL ", nccl_version_text(NcclLibrary::kChannelsPerNetPeer),
        " or later, got ", nccl_version_text(nccl.version), ". Unset RINGKERN_NCCL_CHANNELS."));
  }
  const char* const blocking = std::getenv("NCCL_COMM_BLOCKING");
  if (blocking != nullptr && std::string(blocking) != "0") {
    throw UnsupportedError(concat("NCCL_COMM_BLOCKING: want 0 or none, got \"", blocking,
                                  "\": a call that blocks cannot be aborted. Unset it."));
  }
  NcclConfig config;
  config.version = static_cast<unsigned>(std::min(nccl.version, NcclLibrary::kChannelsPerNetPeer));
  if (options.min_ctas > 0) config.min_ctas = options.min_ctas;
  // A minimum alone is above an undefined maximum, which NCCL refuses.
  if (options.min_ctas > 0) config.max_ctas = kMostCtas;
  if (options.max_ctas > 0) config.max_ctas = options.max_ctas;
  if (options.channels_per_net_peer > 0) {
    config.channels_per_net_peer = options.channels_per_net_peer;
  }
  return config;
}

}  // namespace

std::unique_ptr<DeviceTransport> make_nccl(std::unique_ptr<Transport> control, int rank,
                                           int world_size, std::shared_ptr<const NcclLibrary> nccl,
                                           std::shared_ptr<const Driver> driver, int device,
                                           const NcclOptions& options) {
  check(control != nullptr, "control", "a ring", "none");
  check(world_size > 0, "world_size", "1 or more", world_size);
  check(rank >= 0 && rank < world_size, "rank", concat("0 to ", world_size - 1), rank);
  check(options.timeout.count() > 0, "timeout", "more than 0 ms", options.timeout.count());
  const NcclConfig config = make_config(*nccl, options);
  std::shared_ptr<NcclCore> core;
  try {
    core =
        std::make_shared<NcclCore>(std::move(control), std::move(nccl), std::move(driver), device,
                                   rank, world_size, options.timeout, options.control_timeout);
  } catch (const CudaError& error) {
    throw UnsupportedError(concat("GPU ", device, ": ", error.what(), "."));
  }
  auto transport = std::make_unique<Nccl>(core, rank, world_size);
  core->connect(config, options.on_idle);
  return transport;
}

}  // namespace ringkern
