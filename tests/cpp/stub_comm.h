// What the stub NCCL is made of: communicators, the groups that threads build, and how messages
// match on the GPU. For stub_nccl.cpp alone.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "stub_gpu.h"

namespace {

constexpr int kSystemError = 2, kInvalidArgument = 4, kInvalidUsage = 5, kInProgress = 7;

struct Part {
  bool is_send;
  int peer;
  char* data;
  std::size_t nbytes;
};

// A message that the GPU has come to; shared with the work that waits for it.
struct Posted {
  char* data;
  std::size_t nbytes;
  bool done = false;
};
using PostedPtr = std::shared_ptr<Posted>;

// Used by streams' work only, which the driver runs under its mutex.
struct Clique {
  std::map<std::pair<int, int>, std::deque<PostedPtr>> sends, recvs;  // by source, destination
};

struct Comm {
  int rank, ranks;
  std::string id;
  stub::Config config;
  std::shared_ptr<Clique> clique;
  std::atomic<bool> aborted{false}, ended{false};
  std::atomic<bool> in_graph{false};  // the graph is the test's
  std::atomic<int> inside{0};
  // Under the world's mutex.
  int questions = 0;  // that are still answered with kInProgress
  int error = 0;
  std::function<void()> begin;  // puts the group on the stream
};

struct World {
  std::mutex mutex;
  std::condition_variable changed;
  int version = 22809;
  int progress = 0, next_id = 1;
  std::string held;
  std::map<std::string, std::pair<int, int>> failures;
  std::map<std::string, int> calls;
  std::map<std::string, std::vector<Comm*>> joined;  // by id
  std::map<int, Comm*> latest;                       // by rank
  std::map<int, int> errors;                         // by rank
  std::map<int, std::vector<std::string>> messages;  // by rank
  std::vector<std::unique_ptr<Comm>> comms;          // for ever: late calls must be noticed
};

World& world() {
  static World* const it = new World;
  return *it;
}

// The group that a thread is building.
struct Group {
  int depth = 0;
  std::vector<Part> parts;
  Comm* comm = nullptr;
  void* stream = nullptr;
};
thread_local Group group;

// Counts the call, holds it when asked to, and gives the result that was asked for.
bool enter(const char* function, int* result) {
  std::unique_lock<std::mutex> lock(world().mutex);
  ++world().calls[function];
  world().changed.wait(lock, [&] { return world().held != function; });
  const auto found = world().failures.find(function);
  if (found == world().failures.end() || found->second.second == 0) return false;
  --found->second.second;
  *result = found->second.first;
  return true;
}

#define ENTER(function) \
  if (int result = 0; enter(function, &result)) return result

// One thread at a time, and none after the end.
class Inside {
 public:
  Inside(Comm* comm, const char* function) : comm_(comm) {
    if (comm_->inside++ > 0) stub::violate(std::string(function) + " beside another call");
    if (comm_->ended) stub::violate(std::string(function) + " after the communicator's end");
  }
  ~Inside() { --comm_->inside; }

 private:
  Comm* const comm_;
};

void match(Clique& clique, std::pair<int, int> pair) {
  auto& sends = clique.sends[pair];
  auto& recvs = clique.recvs[pair];
  while (!sends.empty() && !recvs.empty() && sends.front()->nbytes == recvs.front()->nbytes) {
    if (sends.front()->nbytes > 0) {
      std::memcpy(recvs.front()->data, sends.front()->data, sends.front()->nbytes);
    }
    sends.front()->done = recvs.front()->done = true;
    sends.pop_front();
    recvs.pop_front();
  }
}

void forget(std::deque<PostedPtr>& queue, const PostedPtr& what) {
  queue.erase(std::remove(queue.begin(), queue.end(), what), queue.end());
}

// What the kernel of a group does, from its start to its end.
stub::Work run_group(Comm* comm, const std::vector<Part>& parts) {
  auto posted = std::make_shared<std::vector<PostedPtr>>();
  return [comm, parts, posted] {
    Clique& clique = *comm->clique;
    const auto pair = [comm](const Part& part) {
      return part.is_send ? std::make_pair(comm->rank, part.peer)
                          : std::make_pair(part.peer, comm->rank);
    };
    if (posted->empty() && !comm->aborted) {
      for (const Part& part : parts) {
        auto it = std::make_shared<Posted>(Posted{part.data, part.nbytes});
        (part.is_send ? clique.sends : clique.recvs)[pair(part)].push_back(it);
        posted->push_back(std::move(it));
      }
    }
    for (const Part& part : parts) match(clique, pair(part));
    if (comm->aborted) {
      for (std::size_t i = 0; i < posted->size(); ++i) {
        forget((parts[i].is_send ? clique.sends : clique.recvs)[pair(parts[i])], (*posted)[i]);
      }
      return true;
    }
    return std::all_of(posted->begin(), posted->end(), [](const auto& it) { return it->done; });
  };
}

int add(bool is_send, char* data, std::size_t count, int type, int peer, void* handle, void* on) {
  auto* const comm = static_cast<Comm*>(handle);
  const Inside inside(comm, is_send ? "ncclSend" : "ncclRecv");
  if (type != 1 || peer < 0 || peer >= comm->ranks) return kInvalidArgument;
  if (group.depth == 0) stub::violate("a message outside of a group");
  if (group.comm && (group.comm != comm || group.stream != on)) stub::violate("a mixed group");
  group.comm = comm;
  group.stream = on;
  group.parts.push_back({is_send, peer, data, count});
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().messages[comm->rank].push_back((is_send ? "send " : "recv ") + std::to_string(peer) +
                                         " " + std::to_string(count));
  return world().progress > 0 ? kInProgress : 0;
}

}  // namespace
