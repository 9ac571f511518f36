// Runs machine code of NVIDIA's GPUs on the CPU, a warp at a time, and counts what each instruction does and waits for.
//
// A warp issues an instruction after the stall of the one before, and after those whose scoreboards it waits for; their
// latencies are the caller's. Warps of a block meet at barriers; each has its scheduler for itself. Global memory is
// this machine's. An instruction or a modifier that is not in the table is an error, so nothing is counted wrongly in
// silence, and results can be compared with those of another implementation.
#include <sys/mman.h>

#include "opcodes.h"

namespace model {
namespace {

constexpr size_t kBank = 1 << 16;        // bytes of a bank of constants; bank 2 lies behind bank 0
constexpr int64_t kEndless = 1ll << 32;  // cycles, some seconds on a GPU

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
    for (auto& w : b.warps)
      for (const Group& g : w->groups)
        if (g.wait != Wait::kBlock) throw Error("lanes wait for others that will not come");
    for (auto& w : b.warps) {
      if (!w->alive) continue;
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
// Adds an instruction; 0, or -1 where it is unknown, which is an error once a warp runs it.
extern "C" int model_add(Program* program, const char* name, const char* words, const Encoded* encoded) {
  Instruction i{};
  (Encoded&)i = *encoded;
  const bool known = decode(i, name, words);
  program->code.push_back(i);
  return known ? 0 : -1;
}

extern "C" void model_forget_memory(Program* program) { program->memory.clear(); }
extern "C" void model_memory(Program* program, uint64_t begin, uint64_t bytes) {
  program->memory.push_back({begin, begin + bytes});
}

extern "C" L2* model_cache(int64_t bytes) { return new L2(bytes); }
extern "C" void model_cache_free(L2* cache) { delete cache; }
extern "C" void model_start_launch(L2* cache, double before, double rate) { cache->start_launch(before, rate); }
extern "C" int64_t model_written_back(L2* cache) { return cache->written_back(); }

struct Launch {
  uint32_t grid, size;
  int64_t shared_bytes, parameter_bytes, constant_bytes;
  const char *parameters, *constants;  // the argument; bank 2
};

// Runs the blocks of a launch one after the other. Adds to counts [instructions] and writes cycles [grid]; returns 0,
// or -1 on an error.
extern "C" int model_run(Program* program, const Machine* machine, L2* l2, const Launch* launch, Counts* counts,
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
      memcpy(&b.constants[0x28], &kStack, sizeof kStack);  // the stack grows downwards
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
