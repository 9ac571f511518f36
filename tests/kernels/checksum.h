// A checksum of numbers by their bits, with one pattern for every NaN: which one it is the contract leaves
// open.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "scalar.h"

struct Checksum {
  unsigned long long value = 0xcbf29ce484222325ull;

  template <class T>
  void add(T x) {
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    if (is_nan(x)) bits = 0x7ff8;
    value = (value ^ bits) * 0x9e3779b97f4a7c15ull;
    value ^= value >> 32;
  }

 private:
  template <class T>
  static bool is_nan(T x) {
    if constexpr (std::is_integral_v<T>)
      return false;
    else
      return topk_fast::widen(x) != topk_fast::widen(x);
  }
};
