#include "staging_lane.h"

#include <algorithm>
#include <chrono>

namespace ringkern {

bool StagedExchange::has_entered() {
  if (!entered && ready->done()) {
    entered = true;
    entered_at = Clock::now();
  }
  return entered;
}

// ---- what both directions do

void SlotLane::post(StagedExchange& exchange, void* data, std::size_t nbytes) {
  messages_.push_back({&exchange, static_cast<std::uint8_t*>(data), nbytes});
}

StagedExchange* SlotLane::next() {
  const bool has_slot =
      !free_.empty() || slots_.size() < static_cast<std::size_t>(gear_.options.slots);
  return messages_.empty() || !has_slot ? nullptr : messages_.front().exchange;
}

SlotLane::Chunk SlotLane::cut() {
  const std::size_t most = gear_.options.slot_bytes;
  if (free_.empty()) {
    slots_.push_back(std::make_unique<Slot>(gear_.device, most));
    free_.push_back(slots_.back().get());
  }
  Message& message = messages_.front();
  const std::size_t nbytes = std::min(most, message.nbytes - message.cut);
  const Chunk chunk{message.exchange, message.data + message.cut, nbytes, free_.back(), {},
                    Clock::now()};
  free_.pop_back();
  message.cut += nbytes;
  if (nbytes < most) messages_.pop_front();
  return chunk;
}

bool SlotLane::off_wire(Chunk& chunk) {
  if (!gear_.wire.poll(*chunk.on_wire, std::chrono::milliseconds(0))) return false;
  gear_.wire.wait(*chunk.on_wire, 0);
  chunk.on_wire.reset();
  return true;
}

void SlotLane::pass(Chunk& chunk, Leg::Kind kind) {
  gear_.legs.add(kind, peer_, chunk.nbytes, chunk.begun);
  chunk.begun = Clock::now();
}

void SlotLane::pop() {
  free_.push_back(chunks_.front().slot);
  chunks_.pop_front();
}

// ---- from the GPU

// The stream may wait for an exchange that the GPU has not come to, which saves the time until
// somebody notices that it has. Not while older ones have pieces left: these would wait with it.
bool OutLane::may_copy(StagedExchange& exchange) const {
  if (exchange.held || exchange.has_entered()) return true;
  for (const auto& [ticket, other] : gear_.exchanges) {
    if (other.uncut == 0) continue;
    if (ticket != exchange.ticket) return false;
    break;
  }
  exchange.ready->hold(gear_.to_host.handle());
  exchange.held = true;
  return true;
}

bool OutLane::advance() {
  bool moved = false;
  while (!chunks_.empty() && chunks_.front().on_wire && off_wire(chunks_.front())) {
    pass(chunks_.front(), Leg::Kind::kOut);
    --chunks_.front().exchange->unfinished;
    pop();
    moved = true;
  }
  for (Chunk& chunk : chunks_) {
    if (chunk.on_wire) continue;
    const bool copied = chunk.slot->copied.done();
    // Only a timeline asks when a copy that the GPU was given ahead of time could begin: after the
    // copy is asked for, which is not over before.
    if (gear_.legs.wanted() && chunk.exchange->has_entered()) {
      chunk.begun = std::max(chunk.begun, chunk.exchange->entered_at);
    }
    if (!copied) break;
    pass(chunk, Leg::Kind::kToHost);
    chunk.on_wire = gear_.wire.exchange({{peer_, chunk.slot->memory.data(), chunk.nbytes}}, {}, 0);
    --chunk.exchange->unposted;
    moved = true;
  }
  for (auto* exchange = next(); exchange && may_copy(*exchange); exchange = next()) {
    const Chunk chunk = cut();
    if (chunk.nbytes > 0) {
      gear_.to_host.copy_to_host(chunk.slot->memory.data(), chunk.data, chunk.nbytes);
    }
    chunk.slot->copied.record(gear_.to_host.handle());
    --exchange->uncut;
    chunks_.push_back(chunk);
    moved = true;
  }
  return moved;
}

// ---- to the GPU

// A receive is posted when the GPU has come to its exchange: then the wire's deadline counts what
// it should, and no copy that is behind it on the stream waits for the caller.
bool InLane::advance() {
  bool moved = false;
  while (!chunks_.empty() && !chunks_.front().on_wire && chunks_.front().slot->copied.done()) {
    pass(chunks_.front(), Leg::Kind::kToDevice);
    pop();
    moved = true;
  }
  for (Chunk& chunk : chunks_) {
    if (!chunk.on_wire) continue;
    if (!off_wire(chunk)) break;
    pass(chunk, Leg::Kind::kIn);
    if (chunk.nbytes > 0) {
      gear_.to_device.copy_to_device(chunk.data, chunk.slot->memory.data(), chunk.nbytes);
    }
    chunk.slot->copied.record(gear_.to_device.handle());
    --chunk.exchange->unfinished;
    moved = true;
  }
  for (auto* exchange = next(); exchange && exchange->has_entered(); exchange = next()) {
    Chunk chunk = cut();
    chunk.on_wire = gear_.wire.exchange({}, {{peer_, chunk.slot->memory.data(), chunk.nbytes}}, 0);
    --exchange->unposted;
    chunks_.push_back(chunk);
    moved = true;
  }
  return moved;
}

}  // namespace ringkern
