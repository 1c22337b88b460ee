#include "nccl_core.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace ringkern {
namespace {

// An exchange that the GPU has not done costs it memory for what is queued behind it, and a full
// queue would block the caller inside NCCL, where nobody can abort it.
constexpr std::size_t kMostInFlight = 256;

// For how long a caller asks NCCL again and again before it sleeps between two questions.
constexpr std::chrono::microseconds kSpin{200};
constexpr std::chrono::microseconds kPause{50};

constexpr std::chrono::milliseconds kIdle{100};

// The ring ends while a caller is in the middle of a call.
struct Interrupted {};

bool is_remote(const std::exception& error) {
  const auto* nccl = dynamic_cast<const NcclError*>(&error);
  return nccl != nullptr &&
         (nccl->result == NcclLibrary::kRemoteError || nccl->result == NcclLibrary::kSystemError);
}

}  // namespace

NcclCore::NcclCore(std::unique_ptr<Transport> control, std::shared_ptr<const NcclLibrary> nccl,
                   std::shared_ptr<const Driver> driver, int device, int rank, int world_size,
                   std::chrono::milliseconds timeout, std::chrono::milliseconds control_timeout)
    : rank_(rank),
      world_size_(world_size),
      timeout_(timeout),
      control_timeout_(control_timeout),
      control_(std::move(control)),
      device_(std::move(driver), device),
      flights_(device_),
      tally_(world_size),
      comm_(std::move(nccl)) {
  const Device::Use use(device_);
  stream_ = std::make_unique<OwnStream>(device_);
}

NcclCore::~NcclCore() {
  try {
    const Device::Use use(device_);
    flights_.clear();
    stream_.reset();
  } catch (const CudaError&) {
    // At the process's end the driver may be gone before, and with it all that it held.
  }
}

// ---- connecting

void NcclCore::connect(const NcclConfig& config, const std::function<void()>& on_idle) {
  start();
  const Device::Use use(device_);
  Flight flight;
  flight.posted = Clock::now();
  flight.peers = others();
  const Ticket connecting = flights_.open(std::move(flight));
  try {
    share_id(on_idle);
    {
      const std::scoped_lock both(calls_, inside_);
      if (state_ != State::kOpen) throw Interrupted{};
      comm_.start(world_size_, id_, rank_, config);
      settle(on_idle);
    }
    // A rank that is still connecting may wait for a GPU that another rank's messages keep busy.
    meet(on_idle);
    return flights_.drop(connecting);
  } catch (const Interrupted&) {
  } catch (const NcclError& error) {
    trouble(error);
  } catch (const CudaError& error) {
    trouble(error);
  } catch (const TransportError& error) {
    trouble(error);
  }
  raise();
}

void NcclCore::share_id(const std::function<void()>& on_idle) {
  if (rank_ == 0) {
    const NcclLibrary& nccl = comm_.library();
    nccl.check(nccl.get_unique_id(&id_), "ncclGetUniqueId", nullptr);
    std::vector<Send> sends;
    for (const int peer : others()) sends.push_back({peer, &id_, sizeof(id_)});
    finish_on_control(control_->exchange(sends, {}, 0), on_idle);
  } else {
    finish_on_control(control_->exchange({}, {{0, &id_, sizeof(id_)}}, 0), on_idle);
  }
}

void NcclCore::meet(const std::function<void()>& on_idle) {
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  if (rank_ == 0) {
    for (const int peer : others()) recvs.push_back({peer, nullptr, 0});
    finish_on_control(control_->exchange({}, recvs, 0), on_idle);
    for (const int peer : others()) sends.push_back({peer, nullptr, 0});
    finish_on_control(control_->exchange(sends, {}, 0), on_idle);
  } else {
    finish_on_control(control_->exchange({{0, nullptr, 0}}, {{0, nullptr, 0}}, 0), on_idle);
  }
}

void NcclCore::finish_on_control(Ticket ticket, const std::function<void()>& on_idle) {
  while (!control_->poll(ticket, kIdle)) {
    if (on_idle) on_idle();
  }
  control_->wait(ticket, 0);
}

std::vector<int> NcclCore::others() const {
  std::vector<int> ranks;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (rank != rank_) ranks.push_back(rank);
  }
  return ranks;
}

// ---- posting

Ticket NcclCore::exchange(const std::vector<Send>& sends, const std::vector<Recv>& recvs,
                          Stream stream) {
  if (state_ != State::kOpen) raise();
  const bool any = !sends.empty() || !recvs.empty();
  try {
    const Device::Use use(device_);
    const bool captured = any && captures(stream);
    // Before the lock, so that the watching thread can ask NCCL meanwhile.
    if (any && !captured) make_room();
    // Not lock(): the holder may never come back, and the ring's end is for this caller too.
    std::unique_lock<std::mutex> calls(calls_, std::try_to_lock);
    while (!calls && state_ == State::kOpen) {
      std::this_thread::sleep_for(kPause);
      calls.try_lock();
    }
    if (state_ == State::kOpen) {
      return any ? post(sends, recvs, stream, captured) : flights_.open_done();
    }
  } catch (const Interrupted&) {
  } catch (const NcclError& error) {
    trouble(error);
  } catch (const CudaError& error) {
    trouble(error);
  }
  raise();
}

Ticket NcclCore::post(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream stream,
                      bool captured) {
  Flight flight;
  try {
    if (!captured) {
      // The driver would end the capture that this rank's stream is part of.
      if (captures(stream_->handle())) {
        throw UnsupportedError(
            "an exchange while another thread captures exchanges into a CUDA graph: want none. "
            "Make it before the capture or after it.");
      }
      flights_.end_captures();
    }
    flight = flights_.prepare();
    flight.ready->record(stream);
    flight.ready->hold(stream_->handle());
  } catch (const CudaError& error) {
    if (error.is_about_stream()) device_.raise_for_stream(stream, error);
    throw;
  }
  flight.describe(rank_, sends, recvs);
  flight.captured = captured;
  if (captured) has_graphs_ = true;
  // Open before NCCL is called, so that the deadline counts when that takes long.
  const Ticket ticket = flights_.open(std::move(flight));
  {
    const std::lock_guard<std::mutex> inside(inside_);
    if (state_ != State::kOpen) throw Interrupted{};
    comm_.post(sends, recvs, stream_->handle());
    settle(nullptr);
  }
  if (captured) {
    flights_.capture(ticket, stream_->handle());
  } else {
    flights_.launch(ticket, stream_->handle());
  }
  tally_.add(sends, recvs);
  return ticket;
}

bool NcclCore::captures(Stream stream) const {
  try {
    return device_.captures(stream);
  } catch (const CudaError& error) {
    if (error.is_about_stream()) device_.raise_for_stream(stream, error);
    throw;
  }
}

Ticket NcclCore::begin_run(Stream stream) {
  try {
    if (state_ == State::kOpen) {
      const Device::Use use(device_);
      if (captures(stream)) {
        throw UnsupportedError(
            "the run of a graph: want a stream that runs, got one that captures.");
      }
      make_room();
      Flight flight = flights_.prepare();
      flight.ready->record(stream);
      flight.peers = others();
      flight.is_run = true;
      return flights_.open(std::move(flight));
    }
  } catch (const Interrupted&) {
  } catch (const CudaError& error) {
    if (error.is_about_stream()) device_.raise_for_stream(stream, error);
    trouble(error);
  }
  raise();
}

void NcclCore::end_run(Ticket ticket, Stream stream) {
  try {
    if (state_ == State::kOpen) {
      const Device::Use use(device_);
      return flights_.launch(ticket, stream);
    }
  } catch (const CudaError& error) {
    trouble(error);
  }
  raise();
}

void NcclCore::make_room() {
  while (flights_.size() >= kMostInFlight) {
    flights_.reap();
    if (flights_.size() < kMostInFlight) return;
    if (state_ != State::kOpen) throw Interrupted{};
    std::this_thread::sleep_for(kPause);
  }
}

void NcclCore::settle(const std::function<void()>& on_idle) {
  const auto begin = Clock::now();
  auto idle_at = begin + kIdle;
  for (;;) {
    if (state_ != State::kOpen) throw Interrupted{};  // also when NCCL has just come back
    if (comm_.settled()) return;
    const auto now = Clock::now();
    if (now < begin + kSpin) {
      std::this_thread::yield();
      continue;
    }
    std::this_thread::sleep_for(kPause);
    if (on_idle && now >= idle_at) {
      on_idle();
      idle_at = now + kIdle;
    }
  }
}

// ---- waiting

bool NcclCore::poll(std::chrono::milliseconds slice) {
  if (state_ == State::kOpen) return true;
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, slice, [this] { return over(); });
}

Times NcclCore::wait(Ticket ticket, Stream stream) {
  try {
    if (state_ == State::kOpen) {
      const Device::Use use(device_);
      if (const auto times = flights_.wait(ticket, stream)) return *times;
    }
  } catch (const CudaError& error) {
    if (error.is_about_stream()) device_.raise_for_stream(stream, error);
    trouble(error);
  }
  raise();
}

Ticket NcclCore::settled() {
  try {
    if (state_ == State::kOpen || state_ == State::kClosing) {
      const Device::Use use(device_);
      flights_.reap();
    }
  } catch (const CudaError& error) {
    trouble(error);
  }
  return flights_.settled();
}

// ---- failing and leaving, as a caller asks for it

void NcclCore::trouble(const std::exception& error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!trouble_) trouble_ = Trouble{error.what(), is_remote(error)};
  poked_ = true;
  changed_.notify_all();
}

bool NcclCore::over() const {
  return state_ == State::kOver ||
         (state_ == State::kEnding && Clock::now() - ending_since_ > grace());
}

void NcclCore::await_end() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kIdle, [this] { return over(); })) {
  }
}

void NcclCore::raise() {
  await_end();
  const std::lock_guard<std::mutex> lock(mutex_);
  failure_->raise();
}

void NcclCore::abort(const std::string& reason) {
  control_->abort(reason);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    poked_ = true;
    changed_.notify_all();
  }
  await_end();
}

void NcclCore::close() {
  const std::lock_guard<std::mutex> closing(closing_);
  if (closed_) return;
  closed_ = true;
  std::unique_lock<std::mutex> lock(mutex_);
  if (state_ == State::kOpen) state_ = State::kClosing;
  poked_ = true;
  changed_.notify_all();
  // Each step of ending has its own time: a call that does not return, a flush, the GPU's work.
  const auto stuck = [this] {
    return state_ == State::kEnding && Clock::now() - ending_since_ > 3 * grace();
  };
  while (thread_.joinable() && !gone_ && !stuck()) changed_.wait_for(lock, kIdle);
  changed_.wait_for(lock, grace(), [this] { return !guard_.joinable() || guard_gone_; });
  const bool gone = gone_, guard_gone = guard_gone_;
  lock.unlock();
  if (thread_.joinable()) gone ? thread_.join() : thread_.detach();
  if (guard_.joinable()) guard_gone ? guard_.join() : guard_.detach();
  control_->close();
}

}  // namespace ringkern
