// The Python module ringkern._C. The only file that includes Python. Pointers cross as integers;
// their owner is the caller, until wait() returns. The GIL is released in every call that can wait.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "crc32c.h"
#include "cuda.h"
#include "error.h"
#include "handshake.h"
#include "nccl.h"
#include "nccl_library.h"
#include "sha256.h"
#include "socket.h"
#include "staging.h"
#include "tcp.h"
#include "transport.h"

namespace py = pybind11;

namespace ringkern {
namespace {

using Entry = std::tuple<int, std::uintptr_t, std::size_t>;  // peer, pointer, nbytes

// Ctrl-C is looked for this often in calls that wait.
constexpr std::chrono::milliseconds kSlice{100};

constexpr char kDriver[] = "libcuda.so.1";

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Bytes to_bytes(const py::bytes& bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  return Bytes(view.begin(), view.end());
}

std::chrono::milliseconds to_ms(const char* what, double seconds) {
  check(seconds > 0 && seconds < 1e9, what, "more than 0", seconds);
  return std::chrono::ceil<std::chrono::milliseconds>(std::chrono::duration<double>(seconds));
}

// What Python holds of a ring: the ring itself, or the host side of another. It changes only when a
// ring of GPUs takes it over, until when no other thread may have it.
class Link {
 public:
  Link(std::unique_ptr<Transport> owned, int rank, int world_size)
      : rank(rank), world_size(world_size), owned_(std::move(owned)), transport_(owned_.get()) {}
  Link(Transport& borrowed, int rank, int world_size)
      : rank(rank), world_size(world_size), transport_(&borrowed) {}

  // Closing can wait for the ring's threads. They never need the GIL, but others do.
  ~Link() {
    const py::gil_scoped_release nogil;
    owned_.reset();
  }

  Transport& transport() const {
    check(transport_ != nullptr, "ring", "one that can be used", "one that another took over");
    return *transport_;
  }

  DeviceTransport& device() const {
    auto* const device = dynamic_cast<DeviceTransport*>(&transport());
    check(device != nullptr, "ring", "a ring of GPUs", "a ring for host memory");
    return *device;
  }

  std::unique_ptr<Link> host() const {
    return std::make_unique<Link>(device().host(), rank, world_size);
  }

  std::unique_ptr<Transport> take() {
    check(owned_ != nullptr, "ring", "one that owns its connections", "another");
    transport_ = nullptr;
    return std::move(owned_);
  }

  Ticket exchange(const std::vector<Entry>& sends, const std::vector<Entry>& recvs, Stream stream) {
    std::vector<Send> out;
    std::vector<Recv> in;
    out.reserve(sends.size());
    in.reserve(recvs.size());
    for (const auto& [peer, pointer, nbytes] : sends) {
      out.push_back({peer, reinterpret_cast<const void*>(pointer), nbytes});
    }
    for (const auto& [peer, pointer, nbytes] : recvs) {
      in.push_back({peer, reinterpret_cast<void*>(pointer), nbytes});
    }
    const py::gil_scoped_release nogil;
    return transport().exchange(out, in, stream);
  }

  std::pair<std::int64_t, std::int64_t> wait(Ticket ticket, Stream stream) {
    const py::gil_scoped_release nogil;
    while (!transport().poll(ticket, kSlice)) check_signals();
    const Times times = transport().wait(ticket, stream);
    return {times.posted_ns, times.done_ns};
  }

  py::list legs() const {
    std::vector<Leg> legs;
    {
      const py::gil_scoped_release nogil;
      legs = device().legs();
    }
    static constexpr std::array kKinds{"to_host", "out", "in", "to_device"};
    py::list list;
    for (const Leg& leg : legs) {
      const auto kind = kKinds.at(static_cast<std::size_t>(leg.kind));
      list.append(py::make_tuple(kind, leg.peer, leg.nbytes, leg.begun_ns, leg.ended_ns));
    }
    return list;
  }

  py::dict stats() const {
    Stats stats;
    {
      const py::gil_scoped_release nogil;
      stats = transport().stats();
    }
    const auto sum = [](const std::vector<std::uint64_t>& parts) {
      std::uint64_t total = 0;
      for (const auto part : parts) total += part;
      return total;
    };
    py::dict dict;
    dict["bytes_sent"] = sum(stats.bytes_sent);
    dict["bytes_received"] = sum(stats.bytes_received);
    dict["messages_sent"] = stats.messages_sent;
    dict["messages_received"] = stats.messages_received;
    dict["rejected_connections"] = stats.rejected_connections;
    dict["bytes_sent_by_peer"] = stats.bytes_sent;
    dict["bytes_received_by_peer"] = stats.bytes_received;
    return dict;
  }

  const int rank;
  const int world_size;

 private:
  std::unique_ptr<Transport> owned_;
  Transport* transport_;
};

// ---- joining a ring

std::unique_ptr<Link> join_tcp(Listener& listener, int rank,
                               const std::vector<std::string>& addresses, const py::bytes& ring_id,
                               const py::bytes& secret, double timeout_s, int lanes,
                               bool checksum) {
  RingId id;
  const Bytes id_bytes = to_bytes(ring_id);
  check(id_bytes.size() == id.size(), "ring_id", "16 bytes", id_bytes.size());
  std::copy(id_bytes.begin(), id_bytes.end(), id.begin());
  Bytes key = to_bytes(secret);
  TcpOptions options;
  options.timeout = to_ms("timeout_s", timeout_s);
  options.lanes = lanes;
  options.checksum = checksum;
  options.on_idle = check_signals;
  const py::gil_scoped_release nogil;
  return std::make_unique<Link>(
      make_tcp(listener.take(), rank, addresses, id, std::move(key), options), rank,
      static_cast<int>(addresses.size()));
}

std::unique_ptr<Link> join_nccl(Link& control, int device, const std::string& nccl_path,
                                const std::string& cuda_path, double timeout_s,
                                double control_timeout_s, int min_ctas, int max_ctas,
                                int channels_per_net_peer) {
  NcclOptions options;
  options.timeout = to_ms("timeout_s", timeout_s);
  options.control_timeout = to_ms("control_timeout_s", control_timeout_s);
  options.min_ctas = min_ctas;
  options.max_ctas = max_ctas;
  options.channels_per_net_peer = channels_per_net_peer;
  options.on_idle = check_signals;
  const py::gil_scoped_release nogil;
  auto nccl = NcclLibrary::open(nccl_path);
  auto driver = Driver::open(cuda_path);
  return std::make_unique<Link>(make_nccl(control.take(), control.rank, control.world_size,
                                          std::move(nccl), std::move(driver), device, options),
                                control.rank, control.world_size);
}

std::unique_ptr<Link> join_staged(Link& wire, int device, const std::string& cuda_path) {
  const py::gil_scoped_release nogil;
  auto driver = Driver::open(cuda_path);
  return std::make_unique<Link>(
      make_staged(wire.take(), wire.rank, wire.world_size, std::move(driver), device), wire.rank,
      wire.world_size);
}

std::pair<std::string, int> nccl_library(const std::string& path) {
  const auto nccl = NcclLibrary::open(path);
  return {nccl->path, nccl->version};
}

std::pair<std::string, int> cuda_driver(const std::string& path) {
  const auto driver = Driver::open(path);
  return {driver->path, driver->version};
}

// ---- errors

// The classes of ringkern.errors, fetched once. Never freed: the interpreter may be gone by then.
struct Errors {
  explicit Errors(const py::module_& from)
      : argument(from.attr("ArgumentError")),
        unsupported(from.attr("UnsupportedError")),
        transport(from.attr("TransportError")),
        timeout(from.attr("TransportTimeoutError")),
        authentication(from.attr("AuthenticationError")),
        protocol(from.attr("ProtocolError")) {}
  py::object argument, unsupported, transport, timeout, authentication, protocol;
};

const Errors* errors = nullptr;

void raise(const py::object& type, const TransportError& error) {
  const py::object value = type(error.what());
  value.attr("origin") = error.origin;
  PyErr_SetObject(type.ptr(), value.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const ArgumentError& error) {
    PyErr_SetString(errors->argument.ptr(), error.what());
  } catch (const UnsupportedError& error) {
    PyErr_SetString(errors->unsupported.ptr(), error.what());
  } catch (const TimeoutError& error) {
    raise(errors->timeout, error);
  } catch (const AuthenticationError& error) {
    raise(errors->authentication, error);
  } catch (const ProtocolError& error) {
    raise(errors->protocol, error);
  } catch (const TransportError& error) {
    raise(errors->transport, error);
  }
}

py::list list_interfaces() {
  py::list list;
  for (const auto& entry : interfaces()) {
    list.append(py::make_tuple(entry.name, entry.address, entry.is_up, entry.is_loopback));
  }
  return list;
}

py::bytes hmac_of(const py::bytes& key, const py::bytes& data) {
  const auto k = static_cast<std::string_view>(key), d = static_cast<std::string_view>(data);
  const Digest digest = hmac_sha256(k.data(), k.size(), d.data(), d.size());
  return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
}

std::uint32_t crc32c_of(const py::bytes& data) {
  const auto view = static_cast<std::string_view>(data);
  return crc32c(view.data(), view.size());
}

}  // namespace
}  // namespace ringkern

PYBIND11_MODULE(_C, module) {
  using namespace ringkern;
  using NoGil = py::call_guard<py::gil_scoped_release>;

  module.doc() = "The C++ core: a ring of ranks that exchange bytes over TCP or NCCL.";
  errors = new Errors(py::module_::import("ringkern.errors"));
  py::register_local_exception_translator(translate);

  py::class_<Listener>(module, "Listener")
      .def(py::init<const std::string&>(), py::arg("host"))
      .def_property_readonly("address", &Listener::address)
      .def("close", &Listener::close);

  py::class_<Link>(module, "Link")
      .def("exchange", &Link::exchange, py::arg("sends"), py::arg("recvs"), py::arg("stream") = 0)
      .def("wait", &Link::wait, py::arg("ticket"), py::arg("stream") = 0)
      .def(
          "settled", [](Link& link) { return link.device().settled(); }, NoGil())
      .def(
          "begin_run", [](Link& link, Stream stream) { return link.device().begin_run(stream); },
          py::arg("stream"), NoGil())
      .def(
          "end_run",
          [](Link& link, Ticket run, Stream stream) { link.device().end_run(run, stream); },
          py::arg("run"), py::arg("stream"), NoGil())
      .def("host", &Link::host, py::keep_alive<0, 1>())
      .def(
          "abort", [](Link& link, const std::string& why) { link.transport().abort(why); },
          py::arg("reason"), NoGil())
      .def(
          "close", [](Link& link) { link.transport().close(); }, NoGil())
      .def("legs", &Link::legs)
      .def("stats", &Link::stats)
      .def_readonly("rank", &Link::rank)
      .def_readonly("world_size", &Link::world_size);

  module.def("join_tcp", &join_tcp, py::arg("listener"), py::arg("rank"), py::arg("addresses"),
             py::arg("ring_id"), py::arg("secret"), py::arg("timeout_s"), py::arg("lanes") = 1,
             py::arg("checksum") = false);
  module.def("join_nccl", &join_nccl, py::arg("control"), py::arg("device"),
             py::arg("nccl_path") = "", py::arg("cuda_path") = kDriver, py::arg("timeout_s"),
             py::arg("control_timeout_s"), py::arg("min_ctas") = 0, py::arg("max_ctas") = 0,
             py::arg("channels_per_net_peer") = 0);
  module.def("join_staged", &join_staged, py::arg("wire"), py::arg("device"),
             py::arg("cuda_path") = kDriver);
  module.def("nccl_library", &nccl_library, py::arg("path") = "", NoGil());
  module.def("cuda_driver", &cuda_driver, py::arg("path") = kDriver, NoGil());
  module.def("interfaces", &list_interfaces);
  module.def("crc32c", &crc32c_of, py::arg("data"));
  module.def("hmac_sha256", &hmac_of, py::arg("key"), py::arg("data"));
}
