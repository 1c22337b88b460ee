// What tests of rings that fail have in common, whatever memory the rings are for.

#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ranks.h"

namespace ringkern {

// Ring steps until the ring fails.
inline Failure turn_until_failure(
    int rank, int world_size, Transport& ring, Stream stream = 0,
    const std::function<void()>& after_step = [] {}) {
  const int next = (rank + 1) % world_size, prev = (rank + world_size - 1) % world_size;
  // Freed on return: nothing may touch them once the failure is raised.
  const auto out = std::make_unique<std::uint8_t[]>(1000),
             in = std::make_unique<std::uint8_t[]>(1000);
  return failure_of([&] {
    for (;;) {
      ring.wait(ring.exchange({{next, out.get(), 1000}}, {{prev, in.get(), 1000}}, stream), stream);
      after_step();
    }
  });
}

// Later calls raise the same first error.
inline void check_stays_failed(Transport& ring, const Failure& first, Stream stream = 0) {
  std::uint8_t out[4] = {}, in[4] = {};
  CHECK(failure_of([&] { ring.exchange({}, {}, stream); }).text == first.text);
  const auto post = [&] { ring.exchange({{0, out, 4}}, {{0, in, 4}}, stream); };
  CHECK(failure_of(post).text == first.text);
  CHECK(failure_of([&] { ring.wait(1, stream); }).text == first.text);
  ring.abort("something else");
  CHECK(failure_of([&] { ring.exchange({}, {}, stream); }).text == first.text);
}

inline void check_all(const std::vector<Failure>& failures, int origin, Kind kind,
                      const std::string& words) {
  for (const Failure& failure : failures) {
    CHECK(failure.origin == origin);
    CHECK(failure.kind == kind);
    CHECK(contains(failure.text, words));
    CHECK(failure.text.rfind(concat("rank ", origin, " failed"), 0) == 0);
  }
}

}  // namespace ringkern
