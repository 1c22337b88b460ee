// What the stub driver is made of. For stub_cuda.cpp alone.

#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>
#include <set>

#include "stub_gpu.h"

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400;
constexpr int kNotReady = 600, kIsolation = 905, kCapturedEvent = 907;
constexpr int kDevices = 2;
constexpr char kPoison = 0x5a;  // in pinned memory that holds nothing

struct StreamState {
  std::deque<stub::Work> work;
  bool capturing = false;
  bool reserved = false;
};

struct EventState {
  std::uint64_t recorded = 0, passed = 0;
  bool captured = false;
};

struct World {
  std::mutex mutex;
  std::map<void*, StreamState> streams;
  std::map<void*, EventState> events;
  std::map<std::string, std::pair<int, int>> failures;  // result, times
  std::vector<stub::MakeWork> graph;
  std::vector<std::string> violations;
  std::vector<stub::Entry> journal;
  std::map<char*, std::size_t> pinned;  // sizes
  std::multiset<const char*> copying;   // the host's side of copies that have not run
  std::map<std::string, int> let;       // how many copies of a kind may run; none: all
  std::uintptr_t last_handle = 0x1000;
  int retained = 0, latest_priority = 0, questions = 0;
  unsigned latest_flags = 0;
};

World& world() {
  static World* const it = new World;  // threads may outlive the destructors of statics
  return *it;
}

thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;  // global
std::atomic<bool> frees_held{false}, queries_held{false};

void* const kContext = reinterpret_cast<void*>(0x77);

using Lock = std::lock_guard<std::mutex>;

// Everything below needs the mutex.

bool injected(const char* function, int* result) {
  const auto found = world().failures.find(function);
  if (found == world().failures.end() || found->second.second == 0) return false;
  --found->second.second;
  *result = found->second.first;
  return true;
}

void note(const std::string& words) { world().violations.push_back(words); }

void* new_handle() { return reinterpret_cast<void*>(world().last_handle += 16); }

void pump() {
  for (bool progress = true; progress;) {
    progress = false;
    for (auto& [handle, stream] : world().streams) {
      while (!stream.work.empty() && stream.work.front()()) {
        stream.work.pop_front();
        progress = true;
      }
    }
  }
}

void put(StreamState& stream, const stub::MakeWork& make) {
  if (stream.capturing) {
    world().graph.push_back(make);
  } else {
    stream.work.push_back(make());
  }
}

StreamState* find_stream(void* handle) {
  const auto found = world().streams.find(handle);
  return found == world().streams.end() ? nullptr : &found->second;
}

bool any_capture() {
  return std::any_of(world().streams.begin(), world().streams.end(),
                     [](const auto& entry) { return entry.second.capturing; });
}

void need_context(const char* function) {
  if (contexts.empty() || contexts.back() != kContext) {
    note(std::string(function) + " without the context");
  }
}

char* bytes(std::uint64_t address) { return reinterpret_cast<char*>(address); }

void fill(void* memory, std::size_t nbytes) {
  std::fill_n(static_cast<char*>(memory), nbytes, kPoison);
}

void check_pinned(const char* function, const void* host, std::size_t nbytes) {
  auto* const begin = static_cast<char*>(const_cast<void*>(host));
  const auto after = world().pinned.upper_bound(begin);
  const bool inside = after != world().pinned.begin() &&
                      begin + nbytes <= std::prev(after)->first + std::prev(after)->second;
  if (!inside) note(std::string(function) + " with memory that is not pinned");
}

// A copy that runs when the stream comes to it and the test lets it.
int put_copy(const char* kind, void* handle, const stub::Entry& entry,
             const std::function<void()>& copy) {
  auto* const stream = find_stream(handle);
  if (stream == nullptr) return kInvalidHandle;
  const auto* const host = static_cast<const char*>(entry.host);
  world().journal.push_back({std::string(kind) + " put", entry.host, entry.device, entry.nbytes});
  if (host) world().copying.insert(host);
  put(*stream, [=] {
    return [=] {
      if (const auto let = world().let.find(kind); let != world().let.end()) {
        if (let->second == 0) return false;
        --let->second;
      }
      copy();
      if (host) world().copying.erase(world().copying.find(host));
      world().journal.push_back(
          {std::string(kind) + " done", entry.host, entry.device, entry.nbytes});
      return true;
    };
  });
  return 0;
}

}  // namespace
