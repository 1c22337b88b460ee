#include "nccl_comm.h"

#include <cstddef>

namespace ringkern {
namespace {

constexpr int kUint8 = 1;  // ncclUint8

}  // namespace

void NcclComm::start(int world_size, const NcclId& id, int rank, NcclConfig config) {
  const int result = nccl_->init(&made_, world_size, id, rank, &config);
  comm_ = made_;
  nccl_->check(result, "ncclCommInitRankConfig", nullptr);
}

void NcclComm::post(const std::vector<Send>& sends, const std::vector<Recv>& recvs, Stream stream) {
  void* const on = reinterpret_cast<void*>(stream);
  void* const comm = comm_;
  nccl_->check(nccl_->group_start(), "ncclGroupStart", comm);
  int result = NcclLibrary::kSuccess;
  const char* call = "";
  const auto good = [&] {
    return result == NcclLibrary::kSuccess || result == NcclLibrary::kInProgress;
  };
  for (std::size_t i = 0; i < recvs.size() && good(); ++i) {
    call = "ncclRecv";
    result = nccl_->recv(recvs[i].data, recvs[i].nbytes, kUint8, recvs[i].peer, comm, on);
  }
  for (std::size_t i = 0; i < sends.size() && good(); ++i) {
    call = "ncclSend";
    result = nccl_->send(sends[i].data, sends[i].nbytes, kUint8, sends[i].peer, comm, on);
  }
  // A group that was begun is ended, or the thread's next one would be inside it.
  const int end = nccl_->group_end();
  nccl_->check(result, call, comm);
  nccl_->check(end, "ncclGroupEnd", comm);
}

bool NcclComm::settled() const {
  void* const comm = comm_;
  if (comm == nullptr) return true;
  int result = NcclLibrary::kSuccess;
  nccl_->check(nccl_->get_async_error(comm, &result), "ncclCommGetAsyncError", comm);
  nccl_->check(result, "the communicator", comm);
  return result != NcclLibrary::kInProgress;
}

void NcclComm::finalize() { nccl_->check(nccl_->finalize(comm_), "ncclCommFinalize", comm_); }

void NcclComm::destroy() {
  void* const comm = comm_.exchange(nullptr);
  nccl_->check(nccl_->destroy(comm), "ncclCommDestroy", nullptr);
}

void NcclComm::abort() {
  void* const comm = comm_.exchange(nullptr);
  if (comm != nullptr) nccl_->check(nccl_->abort(comm), "ncclCommAbort", nullptr);
}

}  // namespace ringkern
