// Shared libraries that are found at run time, so that one build serves machines with and without
// them.

#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ringkern {

// An open library. Never closed: it may have threads and exit handlers of its own.
class Library {
 public:
  // The copy that is in this process already, whoever loaded it from wherever: its file's name
  // begins with `stem`, as "libnccl.so". A second copy beside it would not know the first one's
  // state.
  static std::optional<Library> loaded(const std::string& stem);

  // Throws UnsupportedError with the linker's words.
  static Library open(const std::string& path);

  // Null when the library has no such symbol. Looks in this library only.
  void* find(const char* symbol) const;

  // Fills `slot`, or adds the name to `missing`.
  template <typename Function>
  void bind(const char* symbol, Function*& slot, std::vector<std::string>& missing) const {
    slot = reinterpret_cast<Function*>(find(symbol));
    if (slot == nullptr) missing.emplace_back(symbol);
  }

  const std::string& path() const { return path_; }

 private:
  Library(void* handle, std::string path) : handle_(handle), path_(std::move(path)) {}

  void* handle_;
  std::string path_;
};

// "a, b, c"
std::string join(const std::vector<std::string>& names);

}  // namespace ringkern
