// Instructions of NVIDIA's machine code as sass.py hands them over, and what is counted for each.
#pragma once

#include <stdint.h>

#include <bitset>
#include <stdexcept>
#include <string>
#include <vector>

namespace model {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kStack = 4096;  // bytes of a thread
// Uniform registers and predicates follow the lanes' own; the last of each kind reads as zero or true.
constexpr int kUniform = 256, kZero = 255, kUniformZero = kUniform + 63, kRegisters = kUniform + 64;
constexpr int kTrue = 7, kUniformTrue = 15, kPredicates = 16;

// The words after the dots of a mnemonic.
#define MODEL_MODIFIERS                                                                                               \
  kU32, kS32, kU64, kS64, kU16, kS16, kU8, kS8, kF16, kF32, kF64, kBF16, kX, kEX, kHI, kSH, kWIDE, kMOV, kIADD, kSHL, \
      kSX32, kLUT, kL, kR, kW, kFTZ, kRZ, kRP, kRM, kTRUNC, kFLOOR, kCEIL, kNTZ, kPACK_AB, kLT, kEQ, kLE, kGT, kNE,   \
      kGE, kLTU, kEQU, kLEU, kGTU, kNEU, kGEU, kNUM, kNAN, kAND, kOR, kXOR, kPAND, kIDX, kUP, kDOWN, kBFLY, kANY,     \
      kALL, kMAX, kMIN, kSUM, kADD, kEXCH, kRCP, kRSQ, kSQRT, kEX2, kLG2, kRCP64H, kE, kU, kCONSTANT, kSTRONG, kWEAK, \
      kGPU, kSYS, kSM, kCTA, kSYNC, kDEFER_BLOCKING, kDIV, kCONV, kEL, kEF, kLTC128B, kREL, kABS, kNOINC, kNODEC,     \
      kCOLLECTIVE, kCLEAR, kB32, kB64, kB128, kMMA, kNA, kZD, kSC, kLU, kBF16_V2, kBF

enum class Mod { MODEL_MODIFIERS, kCount };
using Mods = std::bitset<(size_t)Mod::kCount>;

enum class Kind : int32_t { kNone, kRegister, kImmediate, kConstant };

// A source: a register, 32 bits, or a constant at `value` past the register's content.
struct Operand {
  Kind kind;
  int32_t reg;
  uint32_t value;
  int32_t negative, absolute, inverted, half;  // half: 0 none, 1 the low, 2 the high one
};

struct Predicate {
  int32_t index, inverted;
};

// [base + uniform + offset]; wide: the base is a pair of registers.
struct Address {
  int32_t base, uniform, wide, scale;
  int64_t offset;
};

// As sass.py encodes it; indices of instructions and registers.
struct Encoded {
  int32_t is_uniform, target, stall, write_barrier, read_barrier, wait_mask, latency;
  int32_t dst, n_src, n_pd, n_ps, barrier, special;
  Predicate guard, pd[2], ps[3];
  Operand src[5];
  Address address;
};

struct Warp;
struct Instruction : Encoded {
  Mods mods;
  void (*run)(Warp&, const Instruction&);
  bool has(Mod m) const { return mods[(size_t)m]; }
};

// What was counted at an instruction, over all warps.
struct Counts {
  int64_t issued, lanes, stalled, waited, requests, wavefronts, read, written, from_l2, from_memory;
};

struct Machine {
  int32_t parameters_at, shared_at, is_generic_in_constants, pad;
  int64_t l1_latency, l2_latency, memory_latency, shared_latency, barrier_latency, read_latency;
  int64_t l1_bytes;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace model
