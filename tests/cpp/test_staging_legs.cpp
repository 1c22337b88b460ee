// When the pieces of a GPU's messages were where, as a ring over TCP tells it for timelines.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <vector>

#include "staged_ranks.h"

using namespace ringkern;

TEST_CASE("legs say when each piece was where, once somebody has asked") {
  run_staged(3, staging_options(), [](const StagedRank& it) {
    const std::vector<int> others{(it.rank + 1) % 3, (it.rank + 2) % 3};
    swap(it, others, 130, 0);
    CHECK(it.ring.legs().empty());
    swap(it, others, 130, 1);
    swap(it, {it.rank}, 130, 2);  // takes no piece
    std::vector<Leg> legs;
    until([&] {  // the last copy ends when it likes
      for (const Leg& leg : it.ring.legs()) legs.push_back(leg);
      return legs.size() >= 2 * 4 * 3;
    });
    CHECK(legs.size() == 2 * 4 * 3);
    for (const int peer : others) {
      std::map<Leg::Kind, std::vector<Leg>> by_kind;
      for (const Leg& leg : legs) {
        CHECK(leg.begun_ns <= leg.ended_ns);
        if (leg.peer == peer) by_kind[leg.kind].push_back(leg);
      }
      for (const auto& [kind, some] : by_kind) {
        REQUIRE(some.size() == 3);
        for (std::size_t i = 0; i < 3; ++i) CHECK(some[i].nbytes == (i < 2 ? 64 : 2));
      }
      for (std::size_t i = 0; i < 3; ++i) {
        CHECK(by_kind[Leg::Kind::kToHost][i].ended_ns <= by_kind[Leg::Kind::kOut][i].begun_ns);
        CHECK(by_kind[Leg::Kind::kIn][i].ended_ns <= by_kind[Leg::Kind::kToDevice][i].begun_ns);
      }
    }
    // A stream copies one piece at a time.
    for (const auto kind : {Leg::Kind::kToHost, Leg::Kind::kToDevice}) {
      std::int64_t ended = 0;
      for (const Leg& leg : legs) {
        if (leg.kind != kind) continue;
        CHECK(ended <= leg.begun_ns);
        ended = leg.ended_ns;
      }
    }
  });
}

TEST_CASE("a copy that the GPU was given ahead of time begins when the GPU comes to it") {
  run_staged(2, staging_options(), [](const StagedRank& it) {
    it.ring.legs();
    const Gate gate;
    gate.put(it.stream);
    Messages messages(it, {1 - it.rank}, 10, 0);
    until([] {  // both ranks' GPUs have a copy
      int given = 0;
      for (const auto& entry : stub::journal()) given += entry.what == "DtoH put";
      return given == 2;
    });
    const auto opened = std::chrono::steady_clock::now().time_since_epoch();
    gate.open();
    messages.finish();
    std::vector<Leg> legs;
    until([&] {
      for (const Leg& leg : it.ring.legs()) legs.push_back(leg);
      return legs.size() >= 4;
    });
    for (const Leg& leg : legs) CHECK(leg.begun_ns >= std::chrono::nanoseconds(opened).count());
  });
}
