// Whose ring it is, and what callers may pass to one for a GPU's memory.

#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "error.h"
#include "transport.h"

namespace ringkern {

struct Owner {
  const int rank;
  const int world_size;
  const pid_t pid = ::getpid();

  bool is_this_process() const { return ::getpid() == pid; }

  // In a forked child the ring's threads do not exist, and CUDA does not work.
  void check_process() const {
    if (is_this_process()) return;
    throw TransportError(rank, concat("rank ", rank, " of ", world_size,
                                      ": this ring was made before fork(), in another process. "
                                      "Make the ring in the process that uses it"));
  }

  void check_entries(const std::vector<Send>& sends, const std::vector<Recv>& recvs) const {
    for (const Send& send : sends) check_entry("send", send.peer, send.data, send.nbytes);
    for (const Recv& recv : recvs) check_entry("recv", recv.peer, recv.data, recv.nbytes);
    const std::string out = own_sizes(sends), in = own_sizes(recvs);
    check(out == in, "messages to this rank itself",
          concat("receives of the bytes that are sent, ", out), in);
  }

 private:
  void check_entry(const char* what, int peer, const void* data, std::size_t nbytes) const {
    check(peer >= 0 && peer < world_size, what, concat("a peer from 0 to ", world_size - 1), peer);
    check(data != nullptr || nbytes == 0, what, "a pointer", concat("null for ", nbytes, " bytes"));
  }

  template <typename Entries>
  std::string own_sizes(const Entries& entries) const {
    std::string text;
    for (const auto& entry : entries) {
      if (entry.peer == rank) text += concat(text.empty() ? "" : ", ", entry.nbytes);
    }
    return text.empty() ? "none" : text;
  }
};

}  // namespace ringkern
