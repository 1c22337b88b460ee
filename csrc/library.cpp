#include "library.h"

#include <dlfcn.h>

#include <fstream>
#include <utility>

#include "error.h"

namespace ringkern {
namespace {

constexpr int kMode = RTLD_NOW | RTLD_LOCAL;

// The file that a line of /proc/self/maps maps; empty for memory without one.
std::string mapped_file(const std::string& line) {
  const auto slash = line.find('/');
  return slash == std::string::npos ? std::string() : line.substr(slash);
}

}  // namespace

std::optional<Library> Library::loaded(const std::string& stem) {
  std::ifstream maps("/proc/self/maps");
  std::string last;
  for (std::string line; std::getline(maps, line);) {
    const std::string path = mapped_file(line);
    if (path.empty() || path == last) continue;
    last = path;
    if (path.compare(path.rfind('/') + 1, stem.size(), stem) != 0) continue;
    // Mapped is not loaded: somebody may only have read the file.
    void* handle = ::dlopen(path.c_str(), kMode | RTLD_NOLOAD);
    if (handle != nullptr) return Library(handle, path);
  }
  return std::nullopt;
}

Library Library::open(const std::string& path) {
  void* handle = ::dlopen(path.c_str(), kMode);
  if (handle != nullptr) return Library(handle, path);
  const char* words = ::dlerror();
  throw UnsupportedError(concat("loading ", path, ": ", words ? words : "no reason given", "."));
}

void* Library::find(const char* symbol) const { return ::dlsym(handle_, symbol); }

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace ringkern
