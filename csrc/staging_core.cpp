#include "staging_core.h"

#include <algorithm>
#include <utility>

namespace ringkern {
namespace {

constexpr std::chrono::milliseconds kIdle{100};

}  // namespace

StagingCore::StagingCore(std::unique_ptr<Transport> wire, int rank, int world_size,
                         std::shared_ptr<const Driver> driver, int device,
                         const StagingOptions& options)
    : rank_(rank),
      world_size_(world_size),
      options_(options),
      wire_(std::move(wire)),
      device_(std::move(driver), device),
      flights_(device_),
      tally_(world_size) {
  const Device::Use use(device_);
  own_ = std::make_unique<OwnStream>(device_);
  gear_.reset(new StagingGear{options_, device_, *wire_, OwnStream(device_), OwnStream(device_),
                              StagedExchanges{}, legs_});
  const auto ranks = static_cast<std::size_t>(world_size);
  outs_.resize(ranks);
  ins_.resize(ranks);
}

StagingCore::~StagingCore() {
  if (!gear_) return;
  try {
    const Device::Use use(device_);
    if (idle()) {
      release();
      return;
    }
  } catch (const CudaError&) {
    // At the process's end the driver may be gone before, and with it all that it held.
  }
  // The GPU still uses the slots, and to free them would wait for it: they are lost.
  for (Lanes* lanes : {&outs_, &ins_}) {
    for (auto& lane : *lanes) static_cast<void>(lane.release());
  }
  static_cast<void>(gear_.release());
}

// ---- posting

Ticket StagingCore::exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                             Stream stream) {
  try {
    if (const auto ticket = post(sends, recvs, stream)) return *ticket;
  } catch (const CudaError& error) {
    trouble(error);
  }
  raise();
}

// None when the ring has ended.
std::optional<Ticket> StagingCore::post(const std::vector<Send>& sends,
                                        const std::vector<Recv>& recvs, Stream stream) {
  if (sends.empty() && recvs.empty()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failure_) return std::nullopt;
    return flights_.open_done();
  }
  const Device::Use use(device_);
  flights_.reap();
  Flight flight = enter(stream);
  flight.describe(rank_, sends, recvs);
  StagedExchange exchange = cut(sends, recvs, flight);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) return std::nullopt;
  const bool has_own = copy_own(sends, recvs, flight);
  if (exchange.unfinished == 0) {
    const Ticket ticket = flights_.open(std::move(flight));
    flights_.launch(ticket, own_->handle());
    tally_.add(sends, recvs);
    return ticket;
  }
  if (has_own) {
    flight.done->record(own_->handle());
    exchange.own = flight.done.get();
  }
  const Ticket ticket = exchange.ticket = flights_.open(std::move(flight));
  open_.insert(ticket);
  unposted_.insert(ticket);
  posted_.push_back(std::move(exchange));
  poked_ = true;
  wake_.notify_one();
  return ticket;
}

Flight StagingCore::enter(Stream stream) {
  try {
    refuse_capture(stream);
    Flight flight = flights_.prepare();
    flight.ready->record(stream);
    return flight;
  } catch (const CudaError& error) {
    device_.raise_for_stream(stream, error);
  }
}

void StagingCore::refuse_capture(Stream stream) const {
  if (!device_.captures(stream)) return;
  throw UnsupportedError(
      "an exchange in a CUDA graph: want a ring over NCCL, got one over TCP, where the CPU moves "
      "each piece. Use NCCL, or exchange outside of the graph.");
}

// Whether there was anything from this rank to itself.
bool StagingCore::copy_own(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                           Flight& flight) {
  bool any = false;
  auto recv = recvs.begin();
  for (const Send& send : sends) {
    if (send.peer != rank_) continue;
    recv = std::find_if(recv, recvs.end(), [this](const Recv& it) { return it.peer == rank_; });
    if (!any) flight.ready->hold(own_->handle());
    if (send.nbytes > 0 && send.data != recv->data) {
      own_->copy_on_device(recv->data, send.data, send.nbytes);
    }
    any = true;
    ++recv;
  }
  return any;
}

StagedExchange StagingCore::cut(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                                const Flight& flight) const {
  StagedExchange exchange;
  exchange.ready = flight.ready.get();
  exchange.sends = sends;
  exchange.recvs = recvs;
  for (const Send& send : sends) {
    if (send.peer != rank_) exchange.uncut += SlotLane::pieces(send.nbytes, options_);
  }
  exchange.unfinished = exchange.uncut;
  for (const Recv& recv : recvs) {
    if (recv.peer != rank_) exchange.unfinished += SlotLane::pieces(recv.nbytes, options_);
  }
  exchange.unposted = exchange.unfinished;
  return exchange;
}

Ticket StagingCore::exchange_on_host(const std::vector<Send>& sends,
                                     const std::vector<Recv>& recvs) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const Ticket last = open_.empty() ? 0 : *open_.rbegin();
    changed_.wait(lock, [&] { return failure_ || unposted_.empty() || *unposted_.begin() > last; });
  }
  return wire_->exchange(sends, recvs, 0);
}

// ---- waiting

bool StagingCore::poll(Ticket ticket, std::chrono::milliseconds slice) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, slice, [&] { return is_through(ticket); });
}

Times StagingCore::wait(Ticket ticket, Stream stream) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return is_through(ticket); });
    if (over_) failure_->raise();
  }
  try {
    const Device::Use use(device_);
    try {
      refuse_capture(stream);
      if (auto times = flights_.wait(ticket, stream)) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (const auto done = done_ns_.extract(ticket)) times->done_ns = done.mapped();
        return *times;
      }
    } catch (const CudaError& error) {
      device_.raise_for_stream(stream, error);
    }
  } catch (const CudaError& error) {
    trouble(error);
  }
  raise();
}

Ticket StagingCore::settled() {
  try {
    const Device::Use use(device_);
    flights_.reap();
  } catch (const CudaError& error) {
    trouble(error);
  }
  return flights_.settled();
}

// ---- failing and leaving, as a caller asks for it

void StagingCore::poke() {
  const std::lock_guard<std::mutex> lock(mutex_);
  poked_ = true;
  wake_.notify_one();
}

void StagingCore::trouble(const std::exception& error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!trouble_) trouble_ = error.what();
  poked_ = true;
  wake_.notify_one();
}

void StagingCore::raise() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return over_; });
  failure_->raise();
}

void StagingCore::abort(const std::string& reason) {
  wire_->abort(reason);
  poke();
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return over_; });
}

void StagingCore::close() {
  const std::lock_guard<std::mutex> closing(closing_);
  if (closed_) return;
  closed_ = true;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    leaving_ = true;
    poked_ = true;
    wake_.notify_one();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  const auto stuck = [this] { return over_ && Clock::now() - over_since_ > options_.grace; };
  while (thread_.joinable() && !gone_ && !stuck()) changed_.wait_for(lock, kIdle);
  const bool gone = gone_;
  lock.unlock();
  if (thread_.joinable()) gone ? thread_.join() : thread_.detach();
  wire_->close();
}

}  // namespace ringkern
