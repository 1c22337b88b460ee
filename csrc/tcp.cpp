#include "tcp.h"

#include <utility>

#include "core.h"
#include "error.h"
#include "owner.h"

namespace ringkern {
namespace {

constexpr std::chrono::milliseconds kIdle{100};
constexpr int kMostLanes = 16;
constexpr std::size_t kMostRanks = 65536;

// The Transport that callers see: checks what they pass, and that the process is still the one
// that made it.
class Tcp : public Transport {
 public:
  Tcp(std::unique_ptr<Core> core, int rank, int world_size)
      : owner_{rank, world_size}, core_(std::move(core)) {}

  ~Tcp() override {
    // In a forked child the loop's thread does not exist and its mutex may be locked for good. The
    // sockets and the epoll set are the parent's too: leave everything as it is.
    if (!owner_.is_this_process()) static_cast<void>(core_.release());
  }

  void connect(const std::function<void()>& on_idle) {
    const Ticket ticket = core_->connect();
    while (!core_->poll(ticket, kIdle)) {
      if (on_idle) on_idle();
    }
    core_->wait(ticket);
  }

  Ticket exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                  Stream /* host memory has none */) override {
    owner_.check_process();
    for (const Send& send : sends) check_entry("send", send.peer, send.data, send.nbytes);
    for (const Recv& recv : recvs) check_entry("recv", recv.peer, recv.data, recv.nbytes);
    return core_->exchange(sends, recvs);
  }

  bool poll(Ticket ticket, std::chrono::milliseconds slice) override {
    return core().poll(ticket, slice);
  }
  Times wait(Ticket ticket, Stream) override { return core().wait(ticket); }
  void abort(const std::string& reason) override { core().abort(reason); }
  void close() override { core().close(); }
  Stats stats() const override { return core().stats(); }

 private:
  Core& core() const {
    owner_.check_process();
    return *core_;
  }

  void check_entry(const char* what, int peer, const void* data, std::size_t nbytes) const {
    if (peer < 0 || peer >= owner_.world_size || peer == owner_.rank) {
      throw ArgumentError(concat(what, ": want a peer from 0 to ", owner_.world_size - 1,
                                 " other than this rank, ", owner_.rank, ", got ", peer, "."));
    }
    check(data != nullptr || nbytes == 0, what, "a pointer", concat("null for ", nbytes, " bytes"));
  }

  const Owner owner_;
  std::unique_ptr<Core> core_;
};

}  // namespace

std::unique_ptr<Transport> make_tcp(Listener listener, int rank,
                                    const std::vector<std::string>& addresses,
                                    const RingId& ring_id, Bytes secret,
                                    const TcpOptions& options) {
  check(!addresses.empty() && addresses.size() <= kMostRanks, "addresses", "one for each rank",
        addresses.size());
  const int world_size = static_cast<int>(addresses.size());
  check(rank >= 0 && rank < world_size, "rank", concat("0 to ", world_size - 1), rank);
  check(options.lanes >= 1 && options.lanes <= kMostLanes, "lanes", "1 to 16", options.lanes);
  check(options.timeout.count() > 0, "timeout", "more than 0 ms", options.timeout.count());
  check(listener.fd() >= 0, "listener", "an open one", "one that is closed or in use");
  std::vector<Address> peers;
  for (const auto& address : addresses) peers.push_back(Address::parse(address));
  const Terms terms{ring_id, world_size, options.lanes, options.checksum};
  auto tcp =
      std::make_unique<Tcp>(std::make_unique<Core>(std::move(listener), rank, std::move(peers),
                                                   terms, std::move(secret), options.timeout),
                            rank, world_size);
  tcp->connect(options.on_idle);
  return tcp;
}

}  // namespace ringkern
