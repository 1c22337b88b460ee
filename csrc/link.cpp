#include "link.h"

#include <algorithm>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

// A data socket that breaks does not say why. The control socket brings the reason, a goodbye or
// the end; it gets this long before the peer is blamed.
constexpr std::chrono::milliseconds kGrace{500};

// The control socket, which the peer always reads, notices a dead host after this time at most. A
// data socket may be full for as long as the peer has not posted its receive; the kernel counts
// that too, so it gets more than the exchange's own deadline.
constexpr std::chrono::milliseconds kDead{30000};

}  // namespace

Link::Link(Ring& ring, int peer)
    : ring_(ring), peer_(peer), outbox_(ring, peer), inbox_(ring, peer) {
  dials_.resize(static_cast<std::size_t>(ring.terms.lanes) + 1);
  sockets_.resize(dials_.size());
}

Link::~Link() {
  if (grace_) ring_.loop.cancel(*grace_);
}

// ---- connecting

void Link::connect() {
  if (connecting_) return;
  connecting_ = true;
  if (ring_.rank < peer_) return;
  for (int lane = 0; lane <= ring_.terms.lanes; ++lane) dial(lane);
}

void Link::connect(Ticket ticket) {
  // The peer may have dialled before this rank came to it.
  if (up_) return ring_.ledger.finish_one(ticket);
  connect_ticket_ = ticket;
  connect();
}

void Link::dial(int lane) {
  dials_[static_cast<std::size_t>(lane)] =
      std::make_unique<Dial>(ring_.loop, ring_.addresses[static_cast<std::size_t>(peer_)],
                             ring_.terms, Place{ring_.rank, peer_, lane}, ring_.secret,
                             [this, lane](Socket socket) { admit(lane, std::move(socket)); });
}

bool Link::is_free(int lane) const {
  return !stopped_ && !up_ && !sockets_[static_cast<std::size_t>(lane)].open();
}

void Link::admit(int lane, Socket socket) {
  if (stopped_) return;
  const auto dead = std::min(ring_.timeout, kDead);
  socket.tune(lane == 0 ? dead : ring_.timeout + kDead);
  sockets_[static_cast<std::size_t>(lane)] = std::move(socket);
  dials_[static_cast<std::size_t>(lane)].reset();
  // Nothing is read before all are there: a receive must not finish before it is announced.
  const auto open = [](const Socket& socket) { return socket.open(); };
  if (!std::all_of(sockets_.begin(), sockets_.end(), open)) return;
  control_ = std::make_unique<Control>(*this, ring_.loop, std::move(sockets_[0]));
  for (int i = 1; i <= ring_.terms.lanes; ++i) {
    Socket& data = sockets_[static_cast<std::size_t>(i)];
    lanes_.push_back(std::make_unique<Lane>(*this, ring_.loop, std::move(data), i));
  }
  up_ = true;
  if (connect_ticket_) ring_.ledger.finish_one(*connect_ticket_);
  connect_ticket_.reset();
  std::size_t none = 0;
  advance(&none);
}

std::string Link::trouble_connecting() const {
  for (const auto& dial : dials_) {
    if (dial && !dial->trouble().empty()) return dial->trouble();
  }
  return ring_.rank < peer_ ? "it has not connected" : "no answer";
}

// ---- posting

void Link::check_post(std::size_t sends, std::size_t recvs) const {
  const std::size_t most = std::max(outbox_.size() + sends, inbox_.size() + recvs);
  check(most <= kMostPosted, "messages in flight with one peer", concat("at most ", kMostPosted),
        most);
  if (left_) raise_left();
}

void Link::advance(std::size_t* budget) {
  connect();
  if (!up_ || stopped_) return;
  while (auto ready = inbox_.next_ready()) {
    Header header = control_header(Type::kReady);
    header.seq = ready->seq;
    header.total = ready->total;
    control_->queue(header);
  }
  control_->flush();
  for (const auto& lane : lanes_) {
    if (outbox_.has_piece()) lane->push(budget);
  }
  for (const auto& lane : lanes_) lane->resume(budget);
}

// ---- what the lanes ask and report

bool Link::next_piece(Piece* piece) {
  if (!outbox_.has_piece()) return false;
  *piece = outbox_.take_piece();
  return true;
}

bool Link::place_piece(const Header& header, int lane, std::uint8_t** place) {
  check_route(header, lane);
  if (header.type != Type::kData) {
    throw ProtocolError(peer_, concat("rank ", peer_, " sent a control frame on a data lane"));
  }
  return inbox_.place(header, place);
}

void Link::lane_broke(const std::string& why) {
  if (stopped_) return;
  if (left_) return check_left();
  if (trouble_.empty()) trouble_ = why;
  if (control_ended_ && lanes_ended()) raise_gone();
  if (grace_) return;
  grace_ = ring_.loop.at(Clock::now() + kGrace, [this] {
    grace_.reset();
    if (!stopped_ && !left_) raise_gone();
  });
}

bool Link::lanes_ended() const {
  return std::all_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->ended(); });
}

// ---- what the control socket reports

void Link::check_route(const Header& header, int lane) const {
  if (header.src == static_cast<std::uint32_t>(peer_) &&
      header.dst == static_cast<std::uint32_t>(ring_.rank) &&
      header.lane == static_cast<std::uint32_t>(lane)) {
    return;
  }
  throw ProtocolError(peer_, concat("rank ", peer_, " sent a frame that belongs elsewhere: from ",
                                    header.src, " to ", header.dst, ", lane ", header.lane));
}

void Link::check_control(const Header& header) const {
  check_route(header, 0);
  if (header.type == Type::kData) {
    throw ProtocolError(peer_, concat("rank ", peer_, " sent data on the control socket"));
  }
}

void Link::take_control(const Header& header, std::string_view text) {
  switch (header.type) {
    case Type::kReady:
      return outbox_.take_ready(header.seq, header.total);
    case Type::kAbort:
      return take_abort(header, text);
    case Type::kBye:
      left_ = true;
      promised_ = header.seq;
      return check_left();
    case Type::kPing: {
      Header pong = control_header(Type::kPong);
      if (ring_.ledger.oldest()) pong.flags = kWaiting;
      // A peer that asks and does not read gets one answer.
      if (control_->flushed()) control_->queue(pong);
      return control_->flush();
    }
    case Type::kPong:
      answered_ = true;
      peer_waits_ = (header.flags & kWaiting) != 0;
      return;
    case Type::kData:
      return;  // check_control() has refused it
  }
}

void Link::take_abort(const Header& header, std::string_view text) {
  const bool known = header.offset >= static_cast<std::uint64_t>(Kind::kTransport) &&
                     header.offset <= static_cast<std::uint64_t>(Kind::kProtocol) &&
                     header.seq < static_cast<std::uint64_t>(ring_.terms.world_size);
  if (!known) throw ProtocolError(peer_, concat("rank ", peer_, " sent an ABORT of no kind"));
  ring_.fail(static_cast<Kind>(header.offset), static_cast<int>(header.seq), clean_text(text),
             peer_);
}

void Link::control_broke(const std::string& why) {
  control_ended_ = true;
  if (stopped_ || left_) return;
  // What the peer wrote before it went may still be in the lanes.
  if (inbox_.size() > 0) return lane_broke(why);
  trouble_ = why;
  raise_gone();
}

// ---- deadlines

std::optional<Pending> Link::oldest() const {
  const auto recv = inbox_.oldest();
  const auto send = outbox_.oldest();
  auto pending = recv && (!send || recv->ticket <= send->ticket) ? recv : send;
  if (connect_ticket_) pending = Pending{*connect_ticket_, ""};
  if (pending && !up_) {
    pending->doing = concat("connecting with ", ring_.name(peer_), ": ", trouble_connecting());
  }
  return pending;
}

void Link::ping(Clock::time_point unless_since) {
  if (!up_ || stopped_ || !answered_ || (pinged_ && *pinged_ >= unless_since)) return;
  pinged_ = Clock::now();
  answered_ = false;
  control_->queue(control_header(Type::kPing));
  control_->flush();
}

bool Link::silent_since(Clock::time_point when) const {
  return pinged_ && !answered_ && *pinged_ <= when;
}

// ---- the end

void Link::check_left() const {
  const bool sends_lost = outbox_.size() > 0;
  const bool recvs_lost = inbox_.expects_beyond(promised_) || (inbox_.size() > 0 && lanes_ended());
  if (sends_lost || recvs_lost) raise_left();
}

void Link::raise_left() const {
  const auto pending = oldest();
  throw TransportError(peer_, concat(ring_.me(), ": ", ring_.name(peer_), " closed its ring ",
                                     pending ? "while this rank is " + pending->doing
                                             : "and can take no more messages"));
}

void Link::raise_gone() const {
  const auto pending = oldest();
  throw TransportError(
      peer_,
      concat(ring_.me(), ": ", pending ? pending->doing : "connected with " + ring_.name(peer_),
             ": ", trouble_, ". Rank ", peer_, " has probably stopped: read its log first"));
}

Header Link::control_header(Type type) const {
  Header header;
  header.type = type;
  header.src = static_cast<std::uint32_t>(ring_.rank);
  header.dst = static_cast<std::uint32_t>(peer_);
  return header;
}

void Link::stop() {
  stopped_ = true;
  outbox_.clear();
  inbox_.clear();
  dials_.clear();
  dials_.resize(static_cast<std::size_t>(ring_.terms.lanes) + 1);
  for (const auto& lane : lanes_) lane->stop();
  if (control_) control_->stop_listening();
}

void Link::tell(const Header& what, std::string_view text) {
  if (!control_ || left_) return;
  Header header = control_header(what.type);
  header.seq = what.seq;
  header.offset = what.offset;
  control_->queue(header, text);
  control_->flush();
}

void Link::say_bye() {
  Header header;
  header.type = Type::kBye;
  header.seq = outbox_.written_in_full();
  tell(header, {});
}

bool Link::flush() {
  if (!control_) return true;
  control_->flush();
  return control_->flushed();
}

void Link::drain() {
  if (control_) control_->drain();
}

}  // namespace ringkern
