// Copies to shared memory that do not wait. Every other one happens when its thread waits for it, so that what is read
// before is seen to be missing, and the rest at once, so that what is still needed is seen to be gone.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  size_t size;
};
inline thread_local unsigned copies = 0;
inline thread_local std::vector<Copy> uncommitted;
inline thread_local std::vector<std::vector<Copy>> committed;

}  // namespace emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  if (++emulation::copies % 2 == 0)
    std::memcpy(to, from, size);
  else
    emulation::uncommitted.push_back({to, from, size});
}

inline void __pipeline_commit() { emulation::committed.push_back(std::exchange(emulation::uncommitted, {})); }

// All but the last `prior` groups.
inline void __pipeline_wait_prior(size_t prior) {
  for (; emulation::committed.size() > prior; emulation::committed.erase(emulation::committed.begin()))
    for (const emulation::Copy& copy : emulation::committed.front()) std::memcpy(copy.to, copy.from, copy.size);
}
