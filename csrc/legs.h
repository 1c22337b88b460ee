// When the pieces of messages were where, for timelines. Filled by one thread, read by any.

#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "loop.h"
#include "transport.h"

namespace ringkern {

class Legs {
 public:
  // Whether anybody wants to know.
  bool wanted() const { return since_ns_ != 0; }
  // Enters a leg that ends now, if it began when it was wanted. One GPU stream does all copies of
  // a kind, one after another, so a copy did not begin before the one ahead of it was over.
  void add(Leg::Kind kind, int peer, std::size_t nbytes, Clock::time_point begun);
  // The latest since the last call; the first call makes them wanted.
  std::vector<Leg> take();

 private:
  static constexpr std::size_t kMost = std::size_t{1} << 17;

  std::atomic<std::int64_t> since_ns_{0};
  std::array<Clock::time_point, 4> ended_{};  // the latest of each kind
  std::mutex mutex_;
  std::deque<Leg> legs_;
};

}  // namespace ringkern
