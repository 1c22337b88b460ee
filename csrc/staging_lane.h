// The way of messages between a GPU and the wire, for one peer and one direction: cut into pieces,
// each through a slot of pinned memory.
//
// Every lane has slots of its own and fills them in the order of its messages. So a piece never
// waits for a slot that a later one has, or another peer's.
//
// A message is cut into full pieces and one that is not full, which may be empty. So each size that
// the wire compares also says whether the message ends there: where two ends disagree about a size,
// they disagree about a piece that both of them have.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "cuda.h"
#include "legs.h"
#include "loop.h"
#include "staging.h"
#include "transport.h"

namespace ringkern {

// An exchange with other ranks that is not through.
struct StagedExchange {
  Ticket ticket = 0;
  std::vector<Send> sends;
  std::vector<Recv> recvs;
  Event* ready = nullptr;      // the caller's stream has come to it
  Event* own = nullptr;        // the copies from this rank to itself are over, where there are any
  std::size_t uncut = 0;       // pieces to send that the GPU has not been given
  std::size_t unposted = 0;    // pieces, of either direction, that the wire has not been given
  std::size_t unfinished = 0;  // pieces that are not sent, or not given to the GPU
  bool entered = false;        // `ready` was seen passed
  Clock::time_point entered_at{};
  bool held = false;  // the stream of copies to the host waits for `ready`

  bool has_entered();
};

// In the order posted.
using StagedExchanges = std::map<Ticket, StagedExchange>;

// What the lanes of a rank work with.
struct StagingGear {
  const StagingOptions options;
  const Device& device;
  Transport& wire;
  OwnStream to_host, to_device;  // one for each of the GPU's copy engines
  StagedExchanges exchanges;
  Legs& legs;
};

// Used by one thread, under a Device::Use.
class SlotLane {
 public:
  SlotLane(StagingGear& gear, int peer) : gear_(gear), peer_(peer) {}
  virtual ~SlotLane() = default;
  SlotLane(const SlotLane&) = delete;
  SlotLane& operator=(const SlotLane&) = delete;

  // How many pieces a message is cut into.
  static std::size_t pieces(std::size_t nbytes, const StagingOptions& options) {
    return nbytes / options.slot_bytes + 1;
  }

  // Takes up the next message. `exchange` stays until all of its pieces are finished.
  void post(StagedExchange& exchange, void* data, std::size_t nbytes);
  // Does what can be done now; returns whether there was anything.
  virtual bool advance() = 0;
  // Whether no piece has a slot.
  bool idle() const { return chunks_.empty(); }

 protected:
  struct Slot {
    Slot(const Device& device, std::size_t nbytes) : memory(device, nbytes), copied(device) {}
    PinnedMemory memory;
    Event copied;
  };

  // A piece that has a slot.
  struct Chunk {
    StagedExchange* exchange;
    std::uint8_t* data;  // the GPU's
    std::size_t nbytes;
    Slot* slot;
    std::optional<Ticket> on_wire;  // none: the GPU has it
    Clock::time_point begun;        // its leg
  };

  // The exchange whose piece is the next to be cut; none when there is none, or no slot is free.
  StagedExchange* next();
  Chunk cut();
  // Whether the wire is done with the piece.
  bool off_wire(Chunk& chunk);
  // Ends one leg of the piece, and begins the next.
  void pass(Chunk& chunk, Leg::Kind kind);
  void pop();

  StagingGear& gear_;
  const int peer_;
  std::deque<Chunk> chunks_;  // in the order cut, which is the order in which they become free

 private:
  struct Message {
    StagedExchange* exchange;
    std::uint8_t* data;
    std::size_t nbytes;
    std::size_t cut = 0;
  };

  std::deque<Message> messages_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> free_;
};

// A piece is copied to the host, then on the wire.
class OutLane : public SlotLane {
 public:
  using SlotLane::SlotLane;
  bool advance() override;

 private:
  bool may_copy(StagedExchange& exchange) const;
};

// A piece is on the wire, then copied to the GPU.
class InLane : public SlotLane {
 public:
  using SlotLane::SlotLane;
  bool advance() override;
};

}  // namespace ringkern
