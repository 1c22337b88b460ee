#include "acceptor.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

// Every rank may dial with all of its lanes at once, and again after a failed attempt. Whoever
// comes when so many are pending takes the place of the oldest: true ranks need milliseconds, so a
// crowd of silent connections keeps none of them out.
std::size_t most_clients(const Terms& terms) {
  return static_cast<std::size_t>(std::max(16, terms.world_size * (terms.lanes + 1) * 4));
}

constexpr int kAcceptsPerTurn = 16;
constexpr std::chrono::milliseconds kRest{100};

}  // namespace

struct Acceptor::Client : Handler {
  Client(Acceptor& owner, Socket client_socket)
      : acceptor(owner),
        socket(std::move(client_socket)),
        watch(owner.loop_, socket.fd(), this),
        greeting(std::make_unique<AcceptorHandshake>(owner.terms_, owner.rank_, owner.secret_),
                 {}) {}
  ~Client() override { acceptor.loop_.cancel(deadline); }

  void on_events(std::uint32_t) override { acceptor.advance(self); }
  const Place& place() const {
    return static_cast<const AcceptorHandshake&>(greeting.handshake()).place();
  }

  Acceptor& acceptor;
  Socket socket;
  Watch watch;
  Greeting greeting;
  Loop::Timer deadline;
  Clients::iterator self;
};

Acceptor::Acceptor(Loop& loop, Listener listener, const Terms& terms, int rank,
                   const Secret& secret, std::chrono::milliseconds handshake_timeout,
                   std::function<bool(const Place&)> is_free,
                   std::function<void(const Place&, Socket)> admit)
    : loop_(loop),
      listener_(std::move(listener)),
      terms_(terms),
      rank_(rank),
      secret_(secret),
      handshake_timeout_(handshake_timeout),
      is_free_(std::move(is_free)),
      admit_(std::move(admit)),
      most_clients_(most_clients(terms)),
      suspicions_(static_cast<std::size_t>(terms.world_size)),
      watch_(loop, listener_.fd(), this) {
  watch_.set(EPOLLIN);
}

Acceptor::~Acceptor() { loop_.cancel(rest_); }

void Acceptor::on_events(std::uint32_t) {
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    Socket socket = listener_.accept();
    if (!socket.open()) {
      if (would_block(errno) || errno == ECONNABORTED) return;
      // Out of descriptors or memory. Who has waited longest makes room, if that helps.
      if (clients_.empty()) return rest();
      drop(clients_.begin(), "it was silent");
      continue;
    }
    if (clients_.size() >= most_clients_) drop(clients_.begin(), "it was silent");
    clients_.push_back(std::make_unique<Client>(*this, std::move(socket)));
    const auto client = std::prev(clients_.end());
    (*client)->self = client;
    (*client)->deadline = loop_.at(Clock::now() + handshake_timeout_,
                                   [this, client] { drop(client, "it was silent"); });
    (*client)->watch.set(EPOLLIN);
  }
}

// Looks again later: an error that stays would make the loop spin on the listener.
void Acceptor::rest() {
  watch_.set(0);
  rest_ = loop_.at(Clock::now() + kRest, [this] { watch_.set(EPOLLIN); });
}

void Acceptor::advance(Clients::iterator client) {
  Client& it = **client;
  Greeting::Progress progress;
  try {
    progress = it.greeting.advance(it.socket);
  } catch (const TransportError& error) {
    return drop(client, error.what());
  }
  if (progress == Greeting::Progress::kClosed) return drop(client, "it hung up");
  if (progress == Greeting::Progress::kWaiting) {
    it.watch.set(it.greeting.wants_to_write() ? EPOLLIN | EPOLLOUT : EPOLLIN);
    return;
  }
  const Place place = it.place();
  if (!is_free_(place)) return drop(client, "its lane is taken");
  it.watch.set(0);
  Socket socket = std::move(it.socket);
  clients_.erase(client);
  admit_(place, std::move(socket));
}

void Acceptor::drop(Clients::iterator client, const std::string& why) {
  ++rejected_;
  const int src = (*client)->place().src;
  if (src >= 0) {
    Suspicion& suspicion = suspicions_[static_cast<std::size_t>(src)];
    ++suspicion.count;
    suspicion.why = why;
  }
  clients_.erase(client);
}

}  // namespace ringkern
