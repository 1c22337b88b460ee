// What can go wrong, sorted by what the caller can do about it. Mirrors errors.py.

#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace ringkern {

// The call is wrong, and nothing was sent: fix the call.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The call is right, but this build or this machine cannot do it.
struct UnsupportedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A peer or a link failed. The ring is finished: make a new one.
struct TransportError : std::runtime_error {
  TransportError(int origin, const std::string& text) : std::runtime_error(text), origin(origin) {}
  const int origin;  // the rank where it began; -1 when that is no rank of the ring
};

// A peer did not answer in time.
struct TimeoutError : TransportError {
  using TransportError::TransportError;
};

// Somebody could not prove that they know the secret.
struct AuthenticationError : TransportError {
  using TransportError::TransportError;
};

// A peer said something that the protocol does not allow.
struct ProtocolError : TransportError {
  using TransportError::TransportError;
};

// The error's class as it travels in an ABORT frame, so that every rank raises the same one.
enum class Kind : std::uint8_t { kTransport = 1, kTimeout = 2, kAuthentication = 3, kProtocol = 4 };

inline Kind kind_of(const std::exception& error) {
  if (dynamic_cast<const TimeoutError*>(&error)) return Kind::kTimeout;
  if (dynamic_cast<const AuthenticationError*>(&error)) return Kind::kAuthentication;
  if (dynamic_cast<const ProtocolError*>(&error)) return Kind::kProtocol;
  return Kind::kTransport;
}

// A transport error as a value: kept as the ring's first error and raised by every later call.
struct Failure {
  Kind kind = Kind::kTransport;
  int origin = -1;
  std::string text;

  [[noreturn]] void raise() const {
    switch (kind) {
      case Kind::kTimeout:
        throw TimeoutError(origin, text);
      case Kind::kAuthentication:
        throw AuthenticationError(origin, text);
      case Kind::kProtocol:
        throw ProtocolError(origin, text);
      case Kind::kTransport:
        break;
    }
    throw TransportError(origin, text);
  }
};

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// The system's words for an errno value. strerror() is not safe between threads; this is.
inline std::string system_words(int error) { return std::generic_category().message(error); }

// Raises ArgumentError("{what}: want {want}, got {got}") unless ok.
template <typename Want, typename Got>
void check(bool ok, const char* what, const Want& want, const Got& got) {
  if (!ok) throw ArgumentError(concat(what, ": want ", want, ", got ", got, "."));
}

}  // namespace ringkern
