// One rank's NCCL communicator: non-blocking, so that it can be aborted whatever it is doing.

#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "nccl_library.h"
#include "transport.h"

namespace ringkern {

// Driven by one thread at a time, with the GPU's context current. That holds for settled() too:
// NCCL finishes a group in ncclCommGetAsyncError, without a lock (group.cc of 2.27.3).
class NcclComm {
 public:
  explicit NcclComm(std::shared_ptr<const NcclLibrary> nccl) : nccl_(std::move(nccl)) {}
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  const NcclLibrary& library() const { return *nccl_; }

  // Begins to connect with the other ranks; done once settled(). NcclError when it cannot.
  void start(int world_size, const NcclId& id, int rank, NcclConfig config);

  // Puts one group of messages on the stream. Until settled() they are not all on it, and
  // nothing else may be put there. NcclError when it cannot.
  void post(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream stream);

  // Whether what was begun is done. NcclError when the communicator has met one.
  bool settled() const;

  // Begins to flush what was posted; done once settled(). Then destroy().
  void finalize();
  void destroy();
  // Ends everything, also what runs on the GPU.
  void abort();

 private:
  const std::shared_ptr<const NcclLibrary> nccl_;
  void* made_ = nullptr;  // NCCL 2.17 reads it for as long as it connects
  std::atomic<void*> comm_{nullptr};
};

}  // namespace ringkern
