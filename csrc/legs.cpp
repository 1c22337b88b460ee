#include "legs.h"

#include <algorithm>

namespace ringkern {

void Legs::add(Leg::Kind kind, int peer, std::size_t nbytes, Clock::time_point begun) {
  if (!wanted() || nanoseconds(begun) < since_ns_) return;
  const auto now = Clock::now();
  const bool copies = kind == Leg::Kind::kToHost || kind == Leg::Kind::kToDevice;
  auto& ended = ended_.at(static_cast<std::size_t>(kind));
  if (copies) begun = std::max(begun, ended);
  ended = now;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (legs_.size() == kMost) legs_.pop_front();
  legs_.push_back({kind, peer, nbytes, nanoseconds(begun), nanoseconds(now)});
}

std::vector<Leg> Legs::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!wanted()) since_ns_ = nanoseconds(Clock::now());
  std::vector<Leg> taken(legs_.begin(), legs_.end());
  legs_.clear();
  return taken;
}

}  // namespace ringkern
