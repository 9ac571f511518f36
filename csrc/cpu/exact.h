// The floating-point mode in which the contract's bits hold.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace topk_fast {

// While it lives, its thread rounds to the nearest and keeps subnormals, whatever mode the thread was in: torch's
// set_flush_denormal reaches the calling thread only, so that without this the bits of a row would depend on the
// thread that takes it.
class ExactFloats {
 public:
  ExactFloats() : mode_(mode()) { set_mode(kExact); }
  ~ExactFloats() { set_mode(mode_); }
  ExactFloats(const ExactFloats&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = uint32_t;
  static constexpr Mode kExact = 0x1f80;  // all exceptions masked, nothing else
  static Mode mode() { return _mm_getcsr(); }
  static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kExact = 0;
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  using Mode = int;
  static constexpr Mode kExact = 0;
  static Mode mode() { return 0; }
  static void set_mode(Mode) {}
#endif
  const Mode mode_;
};

}  // namespace topk_fast
