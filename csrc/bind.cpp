// The Python module ringkern._C. The only file that includes Python. Pointers cross as integers;
// their owner is the caller, until wait() returns. The GIL is released in every call that can wait.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "crc32c.h"
#include "error.h"
#include "handshake.h"
#include "sha256.h"
#include "socket.h"
#include "tcp.h"
#include "transport.h"

namespace py = pybind11;

namespace ringkern {
namespace {

using Entry = std::tuple<int, std::uintptr_t, std::size_t>;  // peer, pointer, nbytes

// Ctrl-C is looked for this often in calls that wait.
constexpr std::chrono::milliseconds kSlice{100};

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Bytes to_bytes(const py::bytes& bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  return Bytes(view.begin(), view.end());
}

// What Python holds. `transport` never changes, so that threads may share it.
class Tcp {
 public:
  Tcp(Listener& listener, int rank, const std::vector<std::string>& addresses,
      const py::bytes& ring_id, const py::bytes& secret, double timeout_s, int lanes, bool checksum)
      : rank(rank), world_size(static_cast<int>(addresses.size())) {
    RingId id;
    const Bytes id_bytes = to_bytes(ring_id);
    check(id_bytes.size() == id.size(), "ring_id", "16 bytes", id_bytes.size());
    std::copy(id_bytes.begin(), id_bytes.end(), id.begin());
    check(timeout_s > 0 && timeout_s < 1e9, "timeout_s", "more than 0", timeout_s);
    Bytes key = to_bytes(secret);
    TcpOptions options;
    options.timeout =
        std::chrono::ceil<std::chrono::milliseconds>(std::chrono::duration<double>(timeout_s));
    options.lanes = lanes;
    options.checksum = checksum;
    options.on_idle = check_signals;
    const py::gil_scoped_release nogil;
    transport = make_tcp(listener.take(), rank, addresses, id, std::move(key), options);
  }

  // Closing can wait for the loop's thread. That thread never needs the GIL, but others do.
  ~Tcp() {
    const py::gil_scoped_release nogil;
    transport.reset();
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
    return transport->exchange(out, in, stream);
  }

  std::pair<std::int64_t, std::int64_t> wait(Ticket ticket, Stream stream) {
    const py::gil_scoped_release nogil;
    while (!transport->poll(ticket, kSlice)) check_signals();
    const Times times = transport->wait(ticket, stream);
    return {times.posted_ns, times.done_ns};
  }

  py::dict stats() const {
    Stats stats;
    {
      const py::gil_scoped_release nogil;
      stats = transport->stats();
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
  std::unique_ptr<Transport> transport;
};

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

  module.doc() = "The C++ core: a ring of ranks that exchange bytes over TCP.";
  errors = new Errors(py::module_::import("ringkern.errors"));
  py::register_local_exception_translator(translate);

  py::class_<Listener>(module, "Listener")
      .def(py::init<const std::string&>(), py::arg("host"))
      .def_property_readonly("address", &Listener::address)
      .def("close", &Listener::close);

  py::class_<Tcp>(module, "Tcp")
      .def(py::init<Listener&, int, const std::vector<std::string>&, const py::bytes&,
                    const py::bytes&, double, int, bool>(),
           py::arg("listener"), py::arg("rank"), py::arg("addresses"), py::arg("ring_id"),
           py::arg("secret"), py::arg("timeout_s"), py::arg("lanes") = 1,
           py::arg("checksum") = false)
      .def("exchange", &Tcp::exchange, py::arg("sends"), py::arg("recvs"), py::arg("stream") = 0)
      .def("wait", &Tcp::wait, py::arg("ticket"), py::arg("stream") = 0)
      .def(
          "abort", [](Tcp& tcp, const std::string& reason) { tcp.transport->abort(reason); },
          py::arg("reason"), NoGil())
      .def(
          "close", [](Tcp& tcp) { tcp.transport->close(); }, NoGil())
      .def("stats", &Tcp::stats)
      .def_readonly("rank", &Tcp::rank)
      .def_readonly("world_size", &Tcp::world_size);

  module.def("interfaces", &list_interfaces);
  module.def("crc32c", &crc32c_of, py::arg("data"));
  module.def("hmac_sha256", &hmac_of, py::arg("key"), py::arg("data"));
}
