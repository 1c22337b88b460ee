#include "nccl_library.h"

#include <algorithm>
#include <optional>

#include "error.h"
#include "library.h"

namespace ringkern {
namespace {

constexpr const char* kStem = "libnccl.so";

// Functions that only newer libraries have, with the version that brought them.
constexpr struct {
  const char* name;
  int since;
} kOptional[] = {
    {"ncclCommSplit", 21801},          {"ncclMemAlloc", 21901},       {"ncclMemFree", 21901},
    {"ncclCommRegister", 21901},       {"ncclCommDeregister", 21901}, {"ncclCommShrink", 22703},
    {"ncclCommWindowRegister", 22703}, {"ncclAlltoAll", 22803},       {"ncclCommRevoke", 22807},
    {"ncclPutSignal", 22902},          {"ncclWaitSignal", 22902},     {"ncclSetEncryption", 23200},
};

std::string named(const NcclLibrary& nccl) {
  return concat("NCCL ", nccl_version_text(nccl.version), " (", nccl.path, ")");
}

Library find_library(const std::string& path) {
  if (auto library = Library::loaded(kStem)) return *library;
  if (!path.empty()) return Library::open(path);
  throw UnsupportedError(
      "libnccl: want the copy that a CUDA build of torch loads, or the path of one, got neither. "
      "Install torch for CUDA, or the package nvidia-nccl-cu13 or nvidia-nccl-cu12.");
}

void check_version(const Library& library, NcclLibrary& nccl) {
  std::vector<std::string> missing;
  library.bind("ncclGetVersion", nccl.get_version, missing);
  if (!missing.empty()) {
    throw UnsupportedError(concat("libnccl: want a library with ncclGetVersion, got ", nccl.path,
                                  ", which has none."));
  }
  const int result = nccl.get_version(&nccl.version);
  if (result != NcclLibrary::kSuccess) {
    throw UnsupportedError(
        concat("libnccl: ncclGetVersion of ", nccl.path, " failed with result ", result, "."));
  }
  if (nccl.version < NcclLibrary::kOldest) {
    throw UnsupportedError(concat("libnccl: want NCCL ", nccl_version_text(NcclLibrary::kOldest),
                                  " or later, got ", named(nccl),
                                  ". Install a newer torch, or a newer nvidia-nccl package."));
  }
}

void bind_all(const Library& library, NcclLibrary& nccl) {
  std::vector<std::string> missing;
  library.bind("ncclGetErrorString", nccl.error_string, missing);
  library.bind("ncclGetLastError", nccl.last_error, missing);
  library.bind("ncclGetUniqueId", nccl.get_unique_id, missing);
  library.bind("ncclCommInitRankConfig", nccl.init, missing);
  library.bind("ncclCommGetAsyncError", nccl.get_async_error, missing);
  library.bind("ncclCommFinalize", nccl.finalize, missing);
  library.bind("ncclCommDestroy", nccl.destroy, missing);
  library.bind("ncclCommAbort", nccl.abort, missing);
  library.bind("ncclGroupStart", nccl.group_start, missing);
  library.bind("ncclGroupEnd", nccl.group_end, missing);
  library.bind("ncclSend", nccl.send, missing);
  library.bind("ncclRecv", nccl.recv, missing);
  if (!missing.empty()) {
    throw UnsupportedError(concat("libnccl: want every function of its version, got ", named(nccl),
                                  " without ", join(missing),
                                  ". It is incomplete: install it again."));
  }
  for (const auto& [name, since] : kOptional) {
    nccl.optionals.push_back({name, since, library.find(name)});
  }
}

}  // namespace

std::shared_ptr<const NcclLibrary> NcclLibrary::open(const std::string& path) {
  const Library library = find_library(path);
  auto nccl = std::make_shared<NcclLibrary>();
  nccl->path = library.path();
  check_version(library, *nccl);
  bind_all(library, *nccl);
  return nccl;
}

void* NcclLibrary::optional(const std::string& name) const {
  const auto found = std::find_if(optionals.begin(), optionals.end(),
                                  [&](const Optional& entry) { return name == entry.name; });
  return found == optionals.end() ? nullptr : found->address;
}

void NcclLibrary::check(int result, const char* call, void* comm) const {
  if (result == kSuccess || result == kInProgress) return;
  const char* last = last_error(comm);
  throw NcclError(result, concat("NCCL ", nccl_version_text(version), ": ", call,
                                 " failed: ", error_string(result),
                                 last && *last ? concat(" (", last, ")") : ""));
}

std::string nccl_version_text(int version) {
  const int major = version < 10000 ? 1000 : 10000;
  return concat(version / major, ".", version % major / 100, ".", version % 100);
}

}  // namespace ringkern
