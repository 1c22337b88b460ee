#include "staging.h"

#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "owner.h"
#include "staging_core.h"

namespace ringkern {
namespace {

constexpr std::size_t kMostSlotBytes = std::size_t{1} << 30;
constexpr int kLeastSlots = 2, kMostSlots = 64;

// The wire, for callers who have host memory: in one order with the staged messages.
class HostSide : public Transport {
 public:
  HostSide(StagingCore& core, const Owner& owner) : core_(core), owner_(owner) {}

  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream) override {
    owner_.check_process();
    return core_.exchange_on_host(sends, recvs);
  }
  bool poll(Ticket ticket, std::chrono::milliseconds slice) override {
    return core_.wire().poll(ticket, slice);
  }
  Times wait(Ticket ticket, Stream stream) override { return core_.wire().wait(ticket, stream); }
  void abort(const std::string& reason) override { core_.wire().abort(reason); }
  void close() override { core_.wire().close(); }
  Stats stats() const override { return core_.wire().stats(); }

 private:
  StagingCore& core_;
  const Owner& owner_;
};

// The Transport that callers see: checks what they pass, and that the process is still the one
// that made it.
class Staged : public DeviceTransport {
 public:
  Staged(std::shared_ptr<StagingCore> core, int rank, int world_size)
      : owner_{rank, world_size}, core_(std::move(core)), host_(*core_, owner_) {}

  ~Staged() override {
    if (owner_.is_this_process()) {
      core_->close();
    } else {
      static_cast<void>(new std::shared_ptr<StagingCore>(std::move(core_)));
    }
  }

  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                  Stream stream) override {
    owner_.check_entries(sends, recvs);
    return core().exchange(sends, recvs, stream);
  }
  bool poll(Ticket ticket, std::chrono::milliseconds slice) override {
    return core().poll(ticket, slice);
  }
  Times wait(Ticket ticket, Stream stream) override { return core().wait(ticket, stream); }
  void abort(const std::string& reason) override { core().abort(reason); }
  void close() override { core().close(); }
  Stats stats() const override { return core().stats(); }
  Ticket settled() override { return core().settled(); }
  std::vector<Leg> legs() override { return core().legs(); }
  Transport& host() override {
    owner_.check_process();
    return host_;
  }

 private:
  StagingCore& core() const {
    owner_.check_process();
    return *core_;
  }

  const Owner owner_;
  std::shared_ptr<StagingCore> core_;
  HostSide host_;
};

}  // namespace

std::unique_ptr<DeviceTransport> make_staged(std::unique_ptr<Transport> wire, int rank,
                                             int world_size, std::shared_ptr<const Driver> driver,
                                             int device, const StagingOptions& options) {
  check(wire != nullptr, "wire", "a ring", "none");
  check(world_size > 0, "world_size", "1 or more", world_size);
  check(rank >= 0 && rank < world_size, "rank", concat("0 to ", world_size - 1), rank);
  check(options.slot_bytes > 0 && options.slot_bytes <= kMostSlotBytes, "slot_bytes",
        concat("1 to ", kMostSlotBytes), options.slot_bytes);
  check(options.slots >= kLeastSlots && options.slots <= kMostSlots, "slots",
        concat(kLeastSlots, " to ", kMostSlots), options.slots);
  check(options.grace.count() > 0, "grace", "more than 0 ms", options.grace.count());
  try {
    const auto core = std::make_shared<StagingCore>(std::move(wire), rank, world_size,
                                                    std::move(driver), device, options);
    core->start();
    return std::make_unique<Staged>(core, rank, world_size);
  } catch (const CudaError& error) {
    throw UnsupportedError(concat("GPU ", device, ": ", error.what(), "."));
  }
}

}  // namespace ringkern
