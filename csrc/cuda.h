// The CUDA driver, found at run time: one device's context, streams, events and pinned memory. What
// is declared here of its interface has the names, types and values that NVIDIA documents and
// keeps.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "transport.h"

namespace ringkern {

// A call of the driver failed; `code` is its CUresult.
struct CudaError : std::runtime_error {
  CudaError(int code, const std::string& text) : std::runtime_error(text), code(code) {}
  // Whether it says that a stream is wrong; other errors say that the context is.
  bool is_about_stream() const;
  const int code;
};

// The driver's functions that are used here. Contexts, streams and events are opaque pointers.
struct Driver {
  static constexpr int kSuccess = 0, kNotReady = 600;

  // Throws UnsupportedError when there is no driver, or one that lacks a function, or no GPU.
  static std::shared_ptr<const Driver> open(const std::string& name = "libcuda.so.1");

  // Throws CudaError unless the result of `call` is kSuccess.
  void check(int result, const char* call) const;

  int version = 0;  // 12040 is CUDA 12.4: the newest that this driver serves
  std::string path;

  int (*init)(unsigned flags);
  int (*get_version)(int* version);
  int (*error_name)(int code, const char** name);
  int (*device_count)(int* count);
  int (*device_get)(int* device, int ordinal);
  int (*context_retain)(void** context, int device);
  int (*context_release)(int device);
  int (*context_push)(void* context);
  int (*context_pop)(void** context);
  int (*exchange_capture_mode)(int* mode);
  int (*priority_range)(int* least, int* greatest);
  int (*stream_create)(void** stream, unsigned flags, int priority);
  int (*stream_destroy)(void* stream);
  int (*stream_query)(void* stream);
  int (*stream_wait)(void* stream, void* event, unsigned flags);
  int (*stream_is_capturing)(void* stream, int* status);
  int (*event_create)(void** event, unsigned flags);
  int (*event_destroy)(void* event);
  int (*event_record)(void* event, void* stream);
  int (*event_query)(void* event);
  int (*host_alloc)(void** memory, std::size_t nbytes, unsigned flags);
  int (*host_free)(void* memory);
  int (*copy_to_host)(void* to, std::uint64_t from, std::size_t nbytes, void* stream);
  int (*copy_to_device)(std::uint64_t to, const void* from, std::size_t nbytes, void* stream);
  int (*copy_on_device)(std::uint64_t to, std::uint64_t from, std::size_t nbytes, void* stream);
};

// One GPU's primary context, which torch and the CUDA runtime use too.
class Device {
 public:
  Device(std::shared_ptr<const Driver> driver, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Makes the context this thread's current one for as long as it exists. Every use of a stream or
  // an event needs one. Under it the thread may query events while another thread captures a
  // graph, which would otherwise end that capture.
  class Use {
   public:
    explicit Use(const Device& device);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    const Driver& driver_;
    int mode_;
  };

  const Driver& driver() const { return *driver_; }
  int ordinal() const { return ordinal_; }
  // Whether work that is put on the stream becomes a graph instead of running.
  bool captures(Stream stream) const;
  // In the handler of an error of a call with a caller's stream: throws ArgumentError where the
  // stream is wrong, else the error again.
  [[noreturn]] void raise_for_stream(Stream stream, const CudaError& error) const;

 private:
  const std::shared_ptr<const Driver> driver_;
  const int ordinal_;
  int device_ = 0;
  void* context_ = nullptr;
};

// A point in a stream's work, without a time.
class Event {
 public:
  explicit Event(const Device& device);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Stream stream);
  // Makes what is put on the stream from now on wait for the latest record().
  void hold(Stream stream) const;
  // Whether the GPU has passed the latest record(), or there was none.
  bool done() const;

 private:
  const Device& device_;
  void* event_ = nullptr;
};

// A stream of this transport's own, ahead of others where the GPU has a choice, and independent of
// CUDA's default stream.
class OwnStream {
 public:
  explicit OwnStream(const Device& device);
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  Stream handle() const { return reinterpret_cast<Stream>(stream_); }
  // The host's side must be pinned, or the calls wait for the GPU.
  void copy_to_host(void* to, const void* from, std::size_t nbytes);
  void copy_to_device(void* to, const void* from, std::size_t nbytes);
  void copy_on_device(void* to, const void* from, std::size_t nbytes);
  // Whether nothing put on it can still run. Also true after an error of the context, which ends
  // all of its work.
  bool idle() const;

 private:
  const Device& device_;
  void* stream_ = nullptr;
};

// Memory of the host that the GPU copies to and from by itself. To free it waits for all of the
// GPU's work, so keep it.
class PinnedMemory {
 public:
  PinnedMemory(const Device& device, std::size_t nbytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  void* data() const { return memory_; }

 private:
  const Device& device_;
  void* memory_ = nullptr;
};

}  // namespace ringkern
