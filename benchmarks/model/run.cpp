// Runs machine code of NVIDIA's GPUs on the CPU, a warp at a time, and counts what each instruction does and waits for.
//
// A warp issues an instruction after the stall of the one before, and after those whose scoreboards it waits for; their
// latencies are the caller's. Warps of a block meet at barriers; each has its scheduler for itself. Global memory is
// this machine's. An instruction or a modifier that is not in the table is an error, so nothing is counted wrongly in
// silence, and results can be compared with those of another implementation.
#include <sys/mman.h>

#include <sstream>

#include "control.h"
#include "memory.h"
#include "real.h"

namespace model {
namespace {

constexpr size_t kBank = 1 << 16;        // bytes of a bank of constants; bank 2 lies behind bank 0
constexpr int64_t kEndless = 1ll << 32;  // cycles, some seconds on a GPU

struct Opcode {
  const char* name;
  void (*run)(Warp&, const Instruction&);
  const char* modifiers;  // those it knows
};

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
const char* const kSpecials[] = {"SR_TID.X", "SR_CTAID.X", "SR_LANEID",  "SR_SWINHI",  "SR_LTMASK",  "SRZ",
                                 "SR_TID.Y", "SR_TID.Z",   "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"};

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
    {"F2F", between_reals, "F32 F64"},
    {"F2FP", pack_halves, "F16 BF16 F32 PACK_AB"},
    {"HADD2", widen_halves, "F32"},
    {"HFMA2", constant_of_halves, "MMA"},
    {"LDC", load_constant, "U8 S8 U16 S16 B64 B128"},
    {"LD", load<false>, MEMORY},
    {"LDG", load<false>, MEMORY},
    {"LDS", load<true>, MEMORY},
    {"ST", store<false>, MEMORY},
    {"STG", store<false>, MEMORY},
    {"STS", store<true>, MEMORY},
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
    {"BAR", block_barrier, "SYNC RED POPC AND OR DEFER_BLOCKING"},
    {"B2R", barrier_result, "RESULT"},
    {"BRA", branch, "DIV CONV"},
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

// Runs a warp until all of its lanes have left or wait for other warps.
void run_warp(Warp& w) {
  Block& b = *w.block;
  for (settle(w); w.current >= 0;) {
    Group& g = w.group();
    const Instruction& i = (*b.code)[(size_t)g.at];
    Counts& c = b.counts[g.at];
    int64_t start = w.clock;
    for (int k = 0; k < 6; ++k)
      if (i.wait_mask >> k & 1) start = std::max(start, w.ready[k]);
    if (start > kEndless) throw Error("a warp that does not end");
    const int64_t stall = std::max(i.stall, 1);
    w.exec = (i.is_uniform ? kAll : g.mask) & w.predicate(i.guard);
    ++c.issued, c.lanes += __builtin_popcount(w.exec);
    c.waited += start - w.clock, c.stalled += stall;
    w.clock = start + stall, w.latency = i.latency, ++g.at;
    const bool works = w.exec != 0;
    try {
      i.run(w, i);
    } catch (const Error& e) {
      throw Error(std::string(e.what()) + ", instruction " + std::to_string(&i - b.code->data()));
    }
    const int64_t done = start + (works ? w.latency : 0);
    if (i.write_barrier < 6) w.ready[i.write_barrier] = std::max(w.ready[i.write_barrier], done);
    if (i.read_barrier < 6)
      w.ready[i.read_barrier] = std::max(w.ready[i.read_barrier], start + b.machine->read_latency);
  }
}

// Runs a block; returns the cycles until its last warp left.
int64_t run_block(Block& b) {
  memset(b.shared, 0xA5, (size_t)(b.machine->shared_at + b.shared_bytes));  // nobody may count on zeros
  for (uint32_t k = 0; k * kLanes < b.size; ++k) {
    b.warps.emplace_back(new Warp{});
    Warp& w = *b.warps.back();
    w.block = &b, w.index = (int)k;
    w.p[kTrue] = w.p[kUniformTrue] = kAll;
    const uint32_t left = b.size - k * kLanes;
    w.alive = left >= kLanes ? kAll : (1u << left) - 1;
    w.groups.push_back({0, w.alive});
  }
  for (;;) {
    int64_t latest = 0;
    bool over = true;
    for (auto& w : b.warps) run_warp(*w), latest = std::max(latest, w->clock), over &= !w->alive;
    if (over) return latest;
    b.votes = 0;
    for (auto& w : b.warps)
      for (const Group& g : w->groups)
        if (g.wait != Wait::kBlock) throw Error("lanes wait for others that will not come");
    for (auto& w : b.warps) {
      if (!w->alive) continue;
      b.votes += (uint32_t)__builtin_popcount(w->voted), w->voted = 0;
      const int64_t until = latest + b.machine->barrier_latency;
      b.counts[w->groups[0].at - 1].waited += until - w->clock;
      w->clock = until;
      for (Group& g : w->groups) g.wait = Wait::kNone;
      if (w->groups.size() > 1) throw Error("a barrier that lanes of a warp reach apart");
    }
  }
}

struct Program {
  std::vector<Instruction> code;
  std::string error;
  std::vector<Range> memory;
};

char* shared_window() {
  static char* at = [] {
    char* found = (char*)mmap(nullptr, 8ull << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* window = (char*)(((uint64_t)found + (4ull << 30) - 1) >> 32 << 32);
    mprotect(window, 1 << 20, PROT_READ | PROT_WRITE);
    return window;
  }();
  return at;
}

}  // namespace
}  // namespace model

using namespace model;

extern "C" Program* model_program() { return new Program; }
extern "C" void model_free(Program* program) { delete program; }
extern "C" const char* model_error(Program* program) { return program->error.c_str(); }
extern "C" int model_special(const char* name) {
  for (int k = 0; k < (int)std::size(kSpecials); ++k)
    if (!strcmp(kSpecials[k], name)) return k;
  return -1;
}

// Adds an instruction; 0, or -1 where it is unknown, which is an error once a warp runs it.
extern "C" int model_add(Program* program, const char* name, const char* words, const Encoded* encoded) {
  const auto found =
      std::find_if(std::begin(kOpcodes), std::end(kOpcodes), [&](const Opcode& o) { return !strcmp(o.name, name); });
  Instruction i{};
  (Encoded&)i = *encoded;
  i.run = unknown;
  try {
    if (found == std::end(kOpcodes)) throw Error("an unknown instruction, " + std::string(name));
    i.mods = modifiers(words);
    if ((i.mods & ~modifiers(found->modifiers)).any())
      throw Error("an unknown form, " + std::string(name) + " " + words);
    i.run = found->run;
  } catch (const Error& e) {
    program->error = e.what();
  }
  program->code.push_back(i);
  return i.run == unknown ? -1 : 0;
}

extern "C" void model_forget_memory(Program* program) { program->memory.clear(); }
extern "C" void model_memory(Program* program, uint64_t begin, uint64_t bytes) {
  program->memory.push_back({begin, begin + bytes});
}

extern "C" Cache* model_cache(int64_t bytes) { return new Cache(bytes); }
extern "C" void model_cache_free(Cache* cache) { delete cache; }
extern "C" int64_t model_written_back(Cache* cache) { return cache->written_back(); }

struct Launch {
  uint32_t grid, size;
  int64_t shared_bytes, parameter_bytes, constant_bytes;
  const char *parameters, *constants;  // the argument; bank 2
};

// Runs the blocks of a launch one after the other. Adds to counts [instructions] and writes cycles [grid]; returns 0,
// or -1 on an error.
extern "C" int model_run(Program* program, const Machine* machine, Cache* l2, const Launch* launch, Counts* counts,
                         int64_t* cycles) {
  try {
    for (uint32_t index = 0; index < launch->grid; ++index) {
      Block b(*machine, l2);
      b.code = &program->code, b.counts = counts, b.memory = &program->memory;
      b.shared = shared_window(), b.shared_bytes = launch->shared_bytes;
      b.index = index, b.grid = launch->grid, b.size = launch->size;
      b.constants.assign((size_t)(kBank + launch->constant_bytes), 0);
      memcpy(b.constants.data() + kBank, launch->constants, (size_t)launch->constant_bytes);
      const uint32_t sizes[6] = {launch->size, 1, 1, launch->grid, 1, 1};
      memcpy(b.constants.data(), sizes, sizeof sizes);
      if (machine->is_generic_in_constants) memcpy(&b.constants[0x18], &b.shared, 8);
      memcpy(&b.constants[(size_t)machine->parameters_at], launch->parameters, (size_t)launch->parameter_bytes);
      cycles[index] = run_block(b);
    }
    return 0;
  } catch (const Error& e) {
    program->error = e.what();
    return -1;
  }
}
