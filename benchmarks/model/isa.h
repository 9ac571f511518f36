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
// Uniform registers and predicates follow the lanes' own; the last of each kind reads as zero or true.
constexpr int kUniform = 256, kZero = 255, kUniformZero = kUniform + 63, kRegisters = kUniform + 64;
constexpr int kTrue = 7, kUniformTrue = 15, kPredicates = 16;

// The words after the dots of a mnemonic.
#define MODEL_MODIFIERS(X)                                                                                             \
  X(U32)                                                                                                               \
  X(S32) X(U64) X(S64) X(U16) X(S16) X(U8) X(S8) X(F16) X(F32) X(F64) X(BF16) X(X) X(EX) X(HI) X(SH) X(WIDE) X(MOV)    \
      X(IADD) X(SHL) X(SX32) X(LUT) X(L) X(R) X(W) X(FTZ) X(RZ) X(RP) X(RM) X(TRUNC) X(FLOOR) X(CEIL) X(NTZ)           \
          X(PACK_AB) X(LT) X(EQ) X(LE) X(GT) X(NE) X(GE) X(LTU) X(EQU) X(LEU) X(GTU) X(NEU) X(GEU) X(NUM) X(NAN)       \
              X(AND) X(OR) X(XOR) X(PAND) X(IDX) X(UP) X(DOWN) X(BFLY) X(ANY) X(ALL) X(MAX) X(MIN) X(SUM) X(ADD)       \
                  X(INC) X(EXCH) X(CAS) X(RCP) X(RSQ) X(SQRT) X(EX2) X(LG2) X(RCP64H) X(E) X(U) X(CONSTANT) X(STRONG)  \
                      X(WEAK) X(GPU) X(SYS) X(SM) X(CTA) X(SYNC) X(RED) X(POPC) X(DEFER_BLOCKING) X(RESULT) X(DIV)     \
                          X(CONV) X(EL) X(EF) X(LTC128B) X(REL) X(ABS) X(NOINC) X(NODEC) X(COLLECTIVE) X(CLEAR) X(B32) \
                              X(B64) X(B128) X(MMA) X(NA) X(ZD) X(SC)

enum class Mod {
#define X(name) k##name,
  MODEL_MODIFIERS(X)
#undef X
      kCount
};
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
  int32_t is_uniform, target, stall, write_barrier, read_barrier, wait_mask, latency, pipe;
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
  int64_t l1_bytes, l2_bytes;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace model
