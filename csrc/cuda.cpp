#include "cuda.h"

#include <utility>
#include <vector>

#include "error.h"
#include "library.h"

namespace ringkern {
namespace {

constexpr unsigned kStreamNonBlocking = 1;   // CU_STREAM_NON_BLOCKING
constexpr unsigned kEventDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING
constexpr int kCaptureRelaxed = 2;           // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr unsigned kHostAllocPortable = 1;   // CU_MEMHOSTALLOC_PORTABLE

void* pointer(Stream stream) { return reinterpret_cast<void*>(stream); }

// The address as the driver takes it, a CUdeviceptr.
std::uint64_t address(const void* memory) { return reinterpret_cast<std::uintptr_t>(memory); }

// A name with _v2 is what the headers have meant by the name without, since CUDA 3.2, 4.0 and 11.0.
std::vector<std::string> bind_all(const Library& library, Driver& driver) {
  std::vector<std::string> missing;
  library.bind("cuInit", driver.init, missing);
  library.bind("cuDriverGetVersion", driver.get_version, missing);
  library.bind("cuGetErrorName", driver.error_name, missing);
  library.bind("cuDeviceGetCount", driver.device_count, missing);
  library.bind("cuDeviceGet", driver.device_get, missing);
  library.bind("cuDevicePrimaryCtxRetain", driver.context_retain, missing);
  library.bind("cuDevicePrimaryCtxRelease_v2", driver.context_release, missing);
  library.bind("cuCtxPushCurrent_v2", driver.context_push, missing);
  library.bind("cuCtxPopCurrent_v2", driver.context_pop, missing);
  library.bind("cuThreadExchangeStreamCaptureMode", driver.exchange_capture_mode, missing);
  library.bind("cuCtxGetStreamPriorityRange", driver.priority_range, missing);
  library.bind("cuStreamCreateWithPriority", driver.stream_create, missing);
  library.bind("cuStreamDestroy_v2", driver.stream_destroy, missing);
  library.bind("cuStreamQuery", driver.stream_query, missing);
  library.bind("cuStreamWaitEvent", driver.stream_wait, missing);
  library.bind("cuStreamIsCapturing", driver.stream_is_capturing, missing);
  library.bind("cuEventCreate", driver.event_create, missing);
  library.bind("cuEventDestroy_v2", driver.event_destroy, missing);
  library.bind("cuEventRecord", driver.event_record, missing);
  library.bind("cuEventQuery", driver.event_query, missing);
  library.bind("cuMemHostAlloc", driver.host_alloc, missing);
  library.bind("cuMemFreeHost", driver.host_free, missing);
  library.bind("cuMemcpyDtoHAsync_v2", driver.copy_to_host, missing);
  library.bind("cuMemcpyHtoDAsync_v2", driver.copy_to_device, missing);
  library.bind("cuMemcpyDtoDAsync_v2", driver.copy_on_device, missing);
  return missing;
}

}  // namespace

bool CudaError::is_about_stream() const {
  constexpr int kInvalidContext = 201, kInvalidHandle = 400;
  constexpr int kFirstOfCapture = 900, kLastOfCapture = 908;
  return code == kInvalidContext || code == kInvalidHandle ||
         (code >= kFirstOfCapture && code <= kLastOfCapture);
}

std::shared_ptr<const Driver> Driver::open(const std::string& name) {
  const Library library = Library::open(name);
  auto driver = std::make_shared<Driver>();
  driver->path = library.path();
  const auto missing = bind_all(library, *driver);
  if (!missing.empty()) {
    throw UnsupportedError(concat("CUDA driver: want one of CUDA 11.0 or later, got ", name,
                                  " without ", join(missing), ". Update the driver."));
  }
  try {
    driver->check(driver->init(0), "cuInit");
    driver->check(driver->get_version(&driver->version), "cuDriverGetVersion");
  } catch (const CudaError& error) {
    throw UnsupportedError(concat("CUDA driver: ", error.what(), ". Run nvidia-smi."));
  }
  return driver;
}

void Driver::check(int result, const char* call) const {
  if (result == kSuccess) return;
  const char* name = nullptr;
  error_name(result, &name);
  throw CudaError(result, concat(call, " failed with ", name ? name : "error", " (", result, ")"));
}

Device::Device(std::shared_ptr<const Driver> driver, int ordinal)
    : driver_(std::move(driver)), ordinal_(ordinal) {
  int count = 0;
  driver_->check(driver_->device_count(&count), "cuDeviceGetCount");
  ringkern::check(ordinal >= 0 && ordinal < count, "device",
                  concat("a GPU from 0 to ", count - 1, ", as this process sees them"), ordinal);
  driver_->check(driver_->device_get(&device_, ordinal), "cuDeviceGet");
  driver_->check(driver_->context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Device::~Device() { driver_->context_release(device_); }

Device::Use::Use(const Device& device) : driver_(*device.driver_), mode_(kCaptureRelaxed) {
  driver_.check(driver_.context_push(device.context_), "cuCtxPushCurrent");
  driver_.exchange_capture_mode(&mode_);
}

Device::Use::~Use() {
  driver_.exchange_capture_mode(&mode_);
  void* context;
  driver_.context_pop(&context);
}

bool Device::captures(Stream stream) const {
  int status = 0;
  driver_->check(driver_->stream_is_capturing(pointer(stream), &status), "cuStreamIsCapturing");
  return status != 0;
}

void Device::raise_for_stream(Stream stream, const CudaError& error) const {
  if (!error.is_about_stream()) throw;
  throw ArgumentError(
      concat("stream: want a stream of GPU ", ordinal_, ", got ", stream, ": ", error.what(), "."));
}

Event::Event(const Device& device) : device_(device) {
  const Driver& driver = device.driver();
  driver.check(driver.event_create(&event_, kEventDisableTiming), "cuEventCreate");
}

Event::~Event() { device_.driver().event_destroy(event_); }

void Event::record(Stream stream) {
  const Driver& driver = device_.driver();
  driver.check(driver.event_record(event_, pointer(stream)), "cuEventRecord");
}

void Event::hold(Stream stream) const {
  const Driver& driver = device_.driver();
  driver.check(driver.stream_wait(pointer(stream), event_, 0), "cuStreamWaitEvent");
}

bool Event::done() const {
  const Driver& driver = device_.driver();
  const int result = driver.event_query(event_);
  if (result == Driver::kNotReady) return false;
  driver.check(result, "cuEventQuery");
  return true;
}

OwnStream::OwnStream(const Device& device) : device_(device) {
  const Driver& driver = device.driver();
  int least = 0, greatest = 0;
  driver.check(driver.priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
  driver.check(driver.stream_create(&stream_, kStreamNonBlocking, greatest),
               "cuStreamCreateWithPriority");
}

OwnStream::~OwnStream() { device_.driver().stream_destroy(stream_); }

bool OwnStream::idle() const { return device_.driver().stream_query(stream_) != Driver::kNotReady; }

void OwnStream::copy_to_host(void* to, const void* from, std::size_t nbytes) {
  const Driver& driver = device_.driver();
  driver.check(driver.copy_to_host(to, address(from), nbytes, stream_), "cuMemcpyDtoHAsync");
}

void OwnStream::copy_to_device(void* to, const void* from, std::size_t nbytes) {
  const Driver& driver = device_.driver();
  driver.check(driver.copy_to_device(address(to), from, nbytes, stream_), "cuMemcpyHtoDAsync");
}

void OwnStream::copy_on_device(void* to, const void* from, std::size_t nbytes) {
  const Driver& driver = device_.driver();
  driver.check(driver.copy_on_device(address(to), address(from), nbytes, stream_),
               "cuMemcpyDtoDAsync");
}

PinnedMemory::PinnedMemory(const Device& device, std::size_t nbytes) : device_(device) {
  const Driver& driver = device.driver();
  driver.check(driver.host_alloc(&memory_, nbytes, kHostAllocPortable), "cuMemHostAlloc");
}

PinnedMemory::~PinnedMemory() { device_.driver().host_free(memory_); }

}  // namespace ringkern
