#include "deadlines.h"

#include <cstdio>

#include "error.h"

namespace ringkern {
namespace {

constexpr int kAskAt = 60, kSilentAt = 90, kIdleAt = 95, kEndAt = 100;

// How long an answer may take before no answer counts as silence.
constexpr int kAnswerWithin = 20;

std::string seconds(Clock::duration age) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", std::chrono::duration<double>(age).count());
  return text;
}

}  // namespace

Deadlines::Deadlines(Ring& ring, const Links& links, const Acceptor& acceptor)
    : ring_(ring), links_(links), acceptor_(acceptor) {}

void Deadlines::arm() {
  if (armed_) return;
  const auto entry = ring_.ledger.oldest();
  if (!entry) return;
  const auto now = Clock::now();
  for (const int percent : {kAskAt, kSilentAt, kIdleAt, kEndAt}) {
    const auto when = entry->posted + part(percent);
    if (when <= now && percent != kEndAt) continue;
    armed_ = true;
    ring_.loop.at(when, [this] { check(); });
    return;
  }
}

void Deadlines::check() {
  armed_ = false;
  if (const auto entry = ring_.ledger.oldest()) check(*entry, Clock::now());
  arm();
}

void Deadlines::check(const Ledger::Entry& entry, Clock::time_point now) {
  const auto age = now - entry.posted;
  const auto late = waiting_for(entry.ticket);
  if (age >= part(kAskAt)) {
    for (Link* link : late) link->ping(entry.posted + part(kAskAt));
  }
  for (const Link* link : late) {
    if (age >= part(kSilentAt) && link->silent_since(now - part(kAnswerWithin))) {
      blame(*link, age, "does not answer: its process is stopped, or its host is gone");
    }
  }
  for (const Link* link : late) {
    if (age >= part(kIdleAt) && link->up() && link->answered() && !link->peer_waits()) {
      blame(*link, age, "is alive but has not posted its side: read its log first");
    }
  }
  if (age < part(kEndAt)) return;
  if (!late.empty()) blame_oldest(*late.front(), age);
  throw TransportError(ring_.rank, concat("ringkern bug, please report: ticket ", entry.ticket,
                                          " is open and no link has its messages"));
}

void Deadlines::blame_oldest(const Link& link, Clock::duration age) const {
  if (link.up()) {
    blame(link, age,
          "is alive and waits too: the link is too slow for this timeout, or the ranks have posted "
          "messages that do not match");
  }
  const auto& suspicion = acceptor_.suspicion(link.peer());
  if (suspicion.count == 0) {
    blame(link, age, "has probably not started, or a firewall is between: read its log first");
  }
  throw AuthenticationError(
      link.peer(), concat(ring_.me(), ": ", link.oldest()->doing, " after ", seconds(age), ". ",
                          suspicion.count, " connections that claimed to be rank ", link.peer(),
                          " failed the handshake, the latest because ", suspicion.why,
                          ". Give all ranks the same secret and the same options"));
}

void Deadlines::blame(const Link& link, Clock::duration age, const std::string& cause) const {
  throw TimeoutError(link.peer(), concat(ring_.me(), ": ", link.oldest()->doing, " after ",
                                         seconds(age), ". Rank ", link.peer(), " ", cause));
}

std::vector<Link*> Deadlines::waiting_for(Ticket ticket) const {
  std::vector<Link*> late;
  for (const auto& link : links_) {
    if (!link) continue;
    const auto pending = link->oldest();
    if (pending && pending->ticket == ticket) late.push_back(link.get());
  }
  return late;
}

}  // namespace ringkern
