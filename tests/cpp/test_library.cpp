// Finding NCCL and the driver: which copy, which version, what is missing.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda.h"
#include "error.h"
#include "library.h"
#include "nccl_library.h"

using namespace ringkern;

namespace {

std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const UnsupportedError& error) {
    return error.what();
  }
  FAIL("no refusal");
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) MESSAGE("'" << part << "' is not in '" << text << "'");
  return found;
}

}  // namespace

// The cases run in this order: each leaves what it has loaded to the next ones.

TEST_CASE("no copy and no path, or a path to nothing, is said in words") {
  CHECK_FALSE(Library::loaded("libnccl.so").has_value());
  CHECK(contains(refusal([] { NcclLibrary::open(""); }), "got neither. Install torch for CUDA"));
  const std::string text = refusal([] { NcclLibrary::open("/nonexistent/libnccl.so.2"); });
  CHECK(contains(text, "loading /nonexistent/libnccl.so.2: "));
  CHECK(contains(text, "No such file"));
  CHECK(contains(refusal([] { Driver::open("libnodriver.so.1"); }), "loading libnodriver.so.1: "));
}

TEST_CASE("a file that is only read is no loaded copy") {
  const int fd = ::open(STUB_NCCL, O_RDONLY | O_CLOEXEC);
  REQUIRE(fd >= 0);
  void* const bytes = ::mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
  ::close(fd);
  REQUIRE(bytes != MAP_FAILED);
  CHECK_FALSE(Library::loaded("libnccl.so").has_value());
  ::munmap(bytes, 4096);
}

TEST_CASE("a library that lacks a function of its version is refused by the function's name") {
  const std::string text = refusal([] { NcclLibrary::open(INCOMPLETE_NCCL); });
  CHECK(contains(text, concat("got NCCL 2.28.9 (", INCOMPLETE_NCCL, ") without ncclRecv. It is")));
  CHECK(contains(refusal([] { Driver::open(INCOMPLETE_CUDA); }),
                 concat("got ", INCOMPLETE_CUDA, " without cuThreadExchangeStreamCaptureMode.")));
  CHECK(contains(refusal([] { NcclLibrary::open("libm.so.6"); }), "ncclGetVersion, got libm.so.6"));
}

TEST_CASE("a path is opened where no copy is loaded, and is the copy from then on") {
  const auto nccl = NcclLibrary::open(STUB_NCCL);
  CHECK(nccl->path == STUB_NCCL);
  CHECK(nccl->version == 22809);
  CHECK(Library::loaded("libnccl.so").value().path() == STUB_NCCL);
  CHECK(NcclLibrary::open("/nonexistent/libnccl.so.2")->path == STUB_NCCL);
  CHECK(NcclLibrary::open("")->path == STUB_NCCL);
}

TEST_CASE("functions of newer versions are null where the library has none") {
  const auto nccl = NcclLibrary::open("");
  CHECK(nccl->optional("ncclCommRevoke") != nullptr);
  CHECK(nccl->optional("ncclPutSignal") == nullptr);
  CHECK(nccl->optional("ncclNoSuchThing") == nullptr);
}

TEST_CASE("an NCCL that is too old is refused with both versions") {
  // Every version of the stub is the same file, so it is told which to be.
  const Library stub = Library::open(STUB_NCCL);
  std::vector<std::string> missing;
  void (*set)(int);
  void (*fail)(const char*, int);
  stub.bind("stub_nccl_version", set, missing);
  stub.bind("stub_nccl_fail", fail, missing);
  REQUIRE(missing.empty());
  for (const auto& [code, name] :
       {std::pair<int, const char*>{2804, "2.8.4"}, {21005, "2.10.5"}, {21602, "2.16.2"}}) {
    set(code);
    CHECK(contains(refusal([] { NcclLibrary::open(""); }),
                   concat("want NCCL 2.17.1 or later, got NCCL ", name, " (", STUB_NCCL, ")")));
  }
  set(21701);
  CHECK(NcclLibrary::open("")->version == 21701);
  set(22809);
  fail("ncclGetVersion", 3);
  CHECK(contains(refusal([] { NcclLibrary::open(""); }), "failed with result 3"));
}

TEST_CASE("a driver without a GPU, or with a bad answer, is said in words") {
  const Library stub = Library::open(STUB_CUDA);
  std::vector<std::string> missing;
  void (*fail)(const char*, int);
  stub.bind("stub_cuda_fail", fail, missing);
  REQUIRE(missing.empty());
  fail("cuInit", 100);
  CHECK(refusal([] { Driver::open(STUB_CUDA); }) ==
        "CUDA driver: cuInit failed with CUDA_ERROR_NO_DEVICE (100). Run nvidia-smi.");
  const auto driver = Driver::open(STUB_CUDA);
  CHECK(driver->version == 12040);
  CHECK_THROWS_WITH_AS(Device(driver, 2),
                       "device: want a GPU from 0 to 1, as this process sees them, got 2.",
                       ArgumentError);
  CHECK_THROWS_WITH_AS(driver->check(12345, "cuX"), "cuX failed with error (12345)", CudaError);
}

// In a process of its own, because this one has the stub by now.
TEST_CASE("the real library" * doctest::skip()) {
  const auto nccl = NcclLibrary::open(std::getenv("TEST_NCCL"));
  MESSAGE("NCCL " << nccl_version_text(nccl->version) << " (" << nccl->path << ")");
  CHECK(nccl->version >= NcclLibrary::kOldest);
  for (const auto& [name, since, address] : nccl->optionals) {
    CAPTURE(name);
    CHECK((address != nullptr) == (nccl->version >= since));
  }
  CHECK(std::string(nccl->error_string(6)).find("remote") != std::string::npos);
  NcclId id{};
  CHECK(nccl->get_unique_id(&id) == NcclLibrary::kSuccess);
  CHECK(std::string(id.bytes, sizeof(id.bytes)) != std::string(sizeof(id.bytes), '\0'));
}

TEST_CASE("the real library, where there is one") {
  if (std::getenv("TEST_NCCL") == nullptr) {
    MESSAGE("SKIPPED: the real NCCL: TEST_NCCL is not set to the libnccl.so.2 of a wheel");
    return;
  }
  CHECK(std::system("exec /proc/$PPID/exe --no-skip --test-case='the real library'") == 0);
}
