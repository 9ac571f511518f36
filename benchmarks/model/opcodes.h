// Which instructions there are: their names, what they do, and the modifiers that they know.
#pragma once

#include <sstream>

#include "control.h"
#include "half.h"
#include "memory.h"

namespace model {
namespace {

struct Opcode {
  const char* name;
  void (*run)(Warp&, const Instruction&);
  const char* modifiers;  // those it knows
};

// `special` is a place in encode.py's SPECIALS.
void read_special(Warp& w, const Instruction& i) {
  const Block& b = *w.block;
  const auto value = [&](int l) -> uint32_t {
    switch (i.special) {
      case 0: return (uint32_t)(w.index * kLanes + l);  // the block has one dimension
      case 1: return b.index;
      case 2: return (uint32_t)l;
      case 3: return (uint32_t)((uint64_t)b.shared >> 32);
      case 4: return (1u << l) - 1;
      default: return 0;
    }
  };
  if (i.dst >= kUniform) {
    if (i.special == 0 || i.special == 2 || i.special == 4) throw Error("a lane's number in a uniform register");
    w.set_uniform(i.dst, value(0));
  } else {
    to_lanes(w, i, value);
  }
}
void clear_pair(Warp& w, const Instruction& i) {
  if (i.special != 5) throw Error("CS2R of another register");
  to_wide_lanes(w, i, [](int) { return 0ull; });
}

#define COMPARISONS "LT EQ LE GT NE GE AND OR XOR "
#define MEMORY "E CONSTANT STRONG WEAK GPU SYS SM CTA U U8 S8 U16 S16 B32 B64 B128 EL EF LTC128B NA ZD SC "
const Opcode kOpcodes[] = {
    {"MOV", move, ""},
    {"IADD3", add, "X"},
    {"VIADD", add, ""},
    {"IMAD", multiply_add, "U32 MOV IADD SHL X WIDE HI"},
    {"LEA", shift_add, "HI X SX32"},
    {"SHF", shift, "L R W HI U32 S32 U64 S64"},
    {"LOP3", logic, "LUT PAND"},
    {"PLOP3", predicate_logic, "LUT"},
    {"SEL", select, ""},
    {"ISETP", compare, COMPARISONS "U32 EX"},
    {"IMNMX", extreme_of_two, "U32"},
    {"VIMNMX", extreme_of_two, "U32"},
    {"VIMNMX3", extreme_of_three, "U32"},
    {"VIADDMNMX", extreme_of_sum, "U32"},
    {"PRMT", permute, ""},
    {"POPC", count_bits, ""},
    {"FLO", leading, "U32 SH"},
    {"BREV", reverse_bits, ""},
    {"IABS", magnitude, ""},
    {"P2R", from_predicates, ""},
    {"R2P", to_predicates, ""},
    {"FADD", arithmetic<Step::kAdd>, "FTZ RZ RP RM"},
    {"FMUL", arithmetic<Step::kMultiply>, "FTZ RZ RP RM"},
    {"FFMA", arithmetic<Step::kFused>, "FTZ RZ RP RM"},
    {"DADD", wide_arithmetic<Step::kAdd>, "RZ RP RM"},
    {"DMUL", wide_arithmetic<Step::kMultiply>, "RZ RP RM"},
    {"DFMA", wide_arithmetic<Step::kFused>, "RZ RP RM"},
    {"FSETP", compare_real, COMPARISONS "LTU EQU LEU GTU NEU GEU NUM NAN FTZ"},
    {"DSETP", compare_wide, COMPARISONS "LTU EQU LEU GTU NEU GEU NUM NAN"},
    {"FSEL", select_real, ""},
    {"FMNMX", extreme_real, "FTZ"},
    {"MUFU", special_function, "RCP RSQ SQRT EX2 LG2 RCP64H"},
    {"FCHK", check_division, ""},
    {"F2I", to_integer, "FTZ U32 S32 U64 S64 F64 TRUNC FLOOR CEIL NTZ"},
    {"I2F", from_integer, "U32 S32 U64 S64 U16 S16 U8 F64 RP RM RZ"},
    {"I2FP", from_integer, "F32 U32 S32"},
    {"F2F", between_reals, "F16 F32 F64"},
    {"F2FP", pack_halves, "F16 BF16 F32 PACK_AB"},
    {"HADD2", widen_halves, "F32"},
    {"HSET2", compare_halves<false>, COMPARISONS "LTU EQU LEU GTU NEU GEU NUM NAN BF16_V2 BF"},
    {"HSETP2", compare_halves<true>, COMPARISONS "LTU EQU LEU GTU NEU GEU NUM NAN BF16_V2"},
    {"HMNMX2", extreme_halves, "BF16_V2"},
    {"VHMNMX", extreme_halves, "BF16_V2"},
    {"HFMA2", constant_of_halves, "MMA"},
    {"LDC", load_constant, "U8 S8 U16 S16 B64 B128"},
    {"LD", load<false>, MEMORY},
    {"LDG", load<false>, MEMORY},
    {"LDS", load<true>, MEMORY},
    {"ST", store<false>, MEMORY},
    {"STG", store<false>, MEMORY},
    {"STS", store<true>, MEMORY},
    {"LDL", local_load, "B64 B128 LU"},
    {"STL", local_store, "B64 B128"},
    {"ATOMS", atomic<true>, "ADD MIN MAX AND OR XOR EXCH S32"},
    {"ATOMG", atomic<false>, MEMORY "ADD MIN MAX AND OR XOR EXCH S32"},
    {"RED", atomic<false>, MEMORY "ADD MIN MAX AND OR XOR EXCH S32"},
    {"S2R", read_special, ""},
    {"CS2R", clear_pair, ""},
    {"R2UR", to_uniform, ""},
    {"SHFL", shuffle, "IDX UP DOWN BFLY"},
    {"VOTE", vote, "ANY ALL EQ"},
    {"MATCH", match, "ANY"},
    {"REDUX", reduce, "SUM MIN MAX OR XOR S32"},
    {"BAR", block_barrier, "SYNC DEFER_BLOCKING"},
    {"BRA", branch, "DIV CONV U"},
    {"CALL", call, "REL ABS NOINC"},
    {"RET", give_back, "REL NODEC"},
    {"EXIT", leave, ""},
    {"BSSY", open_convergence, ""},
    {"BSYNC", converge, ""},
    {"BREAK", leave_convergence, ""},
    {"BMOV", move_convergence, "B32 CLEAR"},
    {"WARPSYNC", converge_warp, "ALL COLLECTIVE"},
    {"ENDCOLLECTIVE", nothing, ""},
    {"YIELD", nothing, ""},
    {"NOP", nothing, ""},
    {"LEPC", nothing, ""},
};

void unknown(Warp& w, const Instruction&) {
  if (w.exec) throw Error("an unknown instruction");
}

#define MODEL_TEXT(...) #__VA_ARGS__
#define MODEL_NAMES(...) MODEL_TEXT(__VA_ARGS__)
Mods modifiers(const std::string& words) {
  static const std::vector<std::string> names = [] {
    std::istringstream in(MODEL_NAMES(MODEL_MODIFIERS));  // "kU32, kS32, ..."
    std::vector<std::string> out;
    for (std::string name; in >> name;) out.push_back(name.substr(1, name.find(',') - 1));
    return out;
  }();
  Mods out;
  std::istringstream in(words);
  for (std::string word; in >> word;) {
    const auto found = std::find(names.begin(), names.end(), word);
    if (found == names.end()) throw Error("an unknown modifier, " + word);
    out.set((size_t)(found - names.begin()));
  }
  return out;
}

// Gives an instruction its modifiers and what it does; false where they are unknown, and then it must not run.
bool decode(Instruction& i, const char* name, const char* words) {
  i.run = unknown;
  const auto is_it = [&](const Opcode& o) { return !strcmp(o.name, name); };
  const auto found = std::find_if(std::begin(kOpcodes), std::end(kOpcodes), is_it);
  if (found == std::end(kOpcodes)) return false;
  try {
    i.mods = modifiers(words);
  } catch (const Error&) {
    return false;
  }
  if ((i.mods & ~modifiers(found->modifiers)).any()) return false;
  i.run = found->run;
  return true;
}

}  // namespace
}  // namespace model
