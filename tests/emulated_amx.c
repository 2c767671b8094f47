/* AMX instructions on a CPU without them (but with AVX512-BF16), for emulated_amx.py: preloaded, it does in a signal
   handler what they would do, and answers the questions by which a program looks for them. Some thousand times slower.

   What a CPU would refuse (tiles that do not fit together, a product without a configuration) ends the program.

   Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (state), volume 2
   (instructions, CPUID leaves 7, 0DH, 1DH and 1EH); Linux, Documentation/arch/x86/xstate.rst (permission). */

#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { NEVER = 0x06 }; /* PUSH ES, which 64 bits do not have: emulated_amx.py puts it in the place of a first byte */
enum { TILES = 8, ROWS = 16, ROW = 64 };                      /* bytes of a row */
enum { NONE = 0, P66 = 1, PF3 = 2, PF2 = 3 };                 /* prefixes, as VEX has them */
enum { CONFIGURE = 0x49, MOVE = 0x4b, BFLOATS = 0x5c, BYTES = 0x5e }; /* opcodes of map 0F38 */

/* what LDTILECFG loads, of which a CPU takes one palette and the first TILES; then what is in the tiles */
typedef struct {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  uint8_t tile[TILES][ROWS][ROW];
} State;

static __thread State state __attribute__((tls_model("initial-exec")));
static _Atomic long loads, stores, bfloat_products, byte_products;

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void stop(const uint8_t *at, const char *why) {
  Dl_info library;
  fprintf(stderr, "emulated AMX: %s:", why);
  for (int i = 0; i < 16; i++) fprintf(stderr, " %02x", at[i]);
  fprintf(stderr, " in %s\n", dladdr(at, &library) ? library.dli_fname : "code that was generated");
  _exit(70);
}

/* ------------------------------------------------------------------------------------------ questions */

static void answer_cpuid(greg_t *registers) {
  unsigned leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d;
  __cpuid_count(leaf, sub, a, b, c, d);
  if (leaf == 0 && a < 0x1e) a = 0x1e;
  /* AMX's BF16, TILE and INT8; AVX512-FP16, without which OpenVINO looks for no AMX, and which `stop` would tell of */
  if (leaf == 7 && sub == 0) d |= 1u << 22 | 1u << 24 | 1u << 25 | 1u << 23;
  if (leaf == 0xd && sub == 0) a |= 3u << 17;
  if (leaf == 0x1d) {
    a = sub == 0 ? 1 : sub == 1 ? 1024u << 16 | 8192 : 0; /* bytes of a tile, of all */
    b = sub == 1 ? TILES << 16 | ROW : 0;
    c = sub == 1 ? ROWS : 0;
    d = 0;
  }
  if (leaf == 0x1e) a = c = d = 0, b = sub == 0 ? 64 << 8 | 16 : 0; /* columns and rows of a product */
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
}

static void answer_xgetbv(greg_t *registers) {
  unsigned a, d, c = registers[REG_RCX];
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(c));
  registers[REG_RAX] = c == 0 ? a | 3u << 17 : a, registers[REG_RDX] = d;
}

/* Programs ask Linux for AMX by a number, there is no function of the C library for that. */
long syscall(long number, ...) {
  static long (*next)(long, ...);
  long given[6];
  va_list rest;
  va_start(rest, number);
  for (int i = 0; i < 6; i++) given[i] = va_arg(rest, long);
  va_end(rest);
  if (number == SYS_arch_prctl && given[0] >= 0x1021 && given[0] <= 0x1023) { /* ARCH_GET_XCOMP_SUPP to REQ_XCOMP_PERM */
    if (given[0] < 0x1023) *(uint64_t *)given[1] = 0x600e7;
    return 0;
  }
  if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  return next(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}

/* --------------------------------------------------------------------------------------- instructions */

static int fit(int to, int left, int right) {
  const uint16_t *row_bytes = state.config.row_bytes;
  const uint8_t *rows = state.config.rows;
  return state.config.palette == 1 && right < TILES && to != left && to != right && left != right && rows[to] && rows[left] &&
         rows[right] && rows[to] == rows[left] && row_bytes[to] == row_bytes[right] && row_bytes[left] == 4 * rows[right] &&
         row_bytes[to] % 4 == 0;
}

/* A CPU may add up in another order, so the last bit of a sum may differ. */
static void multiply_bfloats(int to, int left, int right) {
  __mmask16 columns = (__mmask16)((1u << state.config.row_bytes[to] / 4) - 1);
  for (int row = 0; row < state.config.rows[to]; row++) {
    __m512 sum = _mm512_setzero_ps();
    for (int k = 0; k < state.config.row_bytes[left] / 4; k++) {
      int32_t pair;
      memcpy(&pair, &state.tile[left][row][4 * k], 4);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(state.tile[right][k]));
    }
    sum = _mm512_add_ps(sum, _mm512_loadu_ps(state.tile[to][row]));
    _mm512_storeu_ps(state.tile[to][row], _mm512_maskz_mov_ps(columns, sum));
  }
}

static void multiply_bytes(int to, int left, int right, int left_signed, int right_signed) {
  for (int row = 0; row < state.config.rows[to]; row++) {
    uint32_t sum[ROW / 4]; /* which wraps around */
    memcpy(sum, state.tile[to][row], ROW);
    for (int k = 0; k < state.config.row_bytes[left] / 4; k++) {
      const uint8_t *a = &state.tile[left][row][4 * k], *b = state.tile[right][k];
      for (int column = 0; column < state.config.row_bytes[to] / 4; column++, b += 4)
        for (int i = 0; i < 4; i++)
          sum[column] += (uint32_t)((left_signed ? (int8_t)a[i] : a[i]) * (right_signed ? (int8_t)b[i] : b[i]));
    }
    memcpy(state.tile[to][row], sum, state.config.row_bytes[to]);
  }
}

static void configure(const uint8_t *from) {
  memset(&state, 0, sizeof state);
  if (!from || !from[0]) return;
  memcpy(&state.config, from, sizeof state.config);
  int reserved = state.config.palette > 1 || state.config.start_row;
  for (int i = 0; i < 14; i++) reserved |= state.config.reserved[i];
  if (reserved) stop(from, "a configuration with a palette, first row or reserved byte that is not known");
  for (int i = 0; i < 16; i++) {
    int row_bytes = state.config.row_bytes[i], rows = state.config.rows[i];
    if (row_bytes > ROW || rows > ROWS || !row_bytes != !rows || (i >= TILES && rows)) stop(from, "a tile of that size");
  }
}

/* An instruction of three bytes VEX, opcode and operands; returns where the next one begins. */
static const uint8_t *execute(const uint8_t *at, greg_t *registers) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) stop(at, "an instruction that is not known");
  int index_high = at[1] & 0x40 ? 0 : 8, base_high = at[1] & 0x20 ? 0 : 8;
  int prefix = at[2] & 3, right = ~at[2] >> 3 & 15, opcode = at[3];
  int mod = at[4] >> 6, reg = at[4] >> 3 & 7, low = at[4] & 7, memory = mod != 3;
  const uint8_t *next = at + 5;
  uint8_t *address = NULL;
  int64_t stride = 0;
  if (memory) {
    int base = low | base_high;
    if (low == 4) {
      int sib = *next++, index = (sib >> 3 & 7) | index_high;
      if (index != 4) stride = registers[REGISTERS[index]] * (1 << (sib >> 6));
      base = (sib & 7) | base_high;
    }
    if ((base & 7) == 5 && mod == 0) stop(at, "an address without a base");
    address = (uint8_t *)registers[REGISTERS[base]];
    int32_t offset = 0;
    if (mod == 1) offset = *(const int8_t *)next;
    if (mod == 2) memcpy(&offset, next, 4);
    address += offset, next += mod == 1 ? 1 : mod == 2 ? 4 : 0;
  }
  if (opcode != CONFIGURE || prefix == PF2)
    if (!state.config.rows[reg]) stop(at, "a tile that is not configured");
  if ((opcode == BFLOATS || opcode == BYTES) && !fit(reg, low, right)) stop(at, "tiles that do not fit together");
  if (opcode == CONFIGURE && prefix == NONE) { /* LDTILECFG, TILERELEASE */
    configure(address);
  } else if (opcode == CONFIGURE && prefix == P66 && memory) { /* STTILECFG */
    memcpy(address, &state.config, sizeof state.config);
  } else if (opcode == CONFIGURE && prefix == PF2 && !memory) { /* TILEZERO */
    memset(state.tile[reg], 0, sizeof state.tile[reg]);
  } else if (opcode == MOVE && prefix == PF3 && memory) { /* TILESTORED */
    stores++;
    for (int row = 0; row < state.config.rows[reg]; row++)
      memcpy(address + row * stride, state.tile[reg][row], state.config.row_bytes[reg]);
  } else if (opcode == MOVE && prefix != NONE && memory) { /* TILELOADD, TILELOADDT1 */
    loads++;
    memset(state.tile[reg], 0, sizeof state.tile[reg]);
    for (int row = 0; row < state.config.rows[reg]; row++)
      memcpy(state.tile[reg][row], address + row * stride, state.config.row_bytes[reg]);
  } else if (opcode == BFLOATS && prefix == PF3 && !memory) { /* TDPBF16PS */
    bfloat_products++;
    multiply_bfloats(reg, low, right);
  } else if (opcode == BYTES && !memory) { /* TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD */
    byte_products++;
    multiply_bytes(reg, low, right, prefix == PF2 || prefix == PF3, prefix == PF2 || prefix == P66);
  } else {
    stop(at, "an instruction of AMX that is not known");
  }
  return next;
}

static void handle(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info;
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)registers[REG_RIP];
  if (at[0] == NEVER && at[1] == 0xa2) { /* CPUID */
    answer_cpuid(registers);
    at += 2;
  } else if (at[0] == NEVER && at[1] == 0x01 && at[2] == 0xd0) { /* XGETBV */
    answer_xgetbv(registers);
    at += 3;
  } else {
    at = execute(at, registers);
  }
  registers[REG_RIP] = (greg_t)at;
}

__attribute__((constructor)) static void begin(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
  sigaction(SIGILL, &action, NULL);
}

__attribute__((destructor)) static void end(void) {
  if (getenv("AMX_COUNT"))
    fprintf(stderr, "emulated AMX: %ld tiles loaded, %ld stored, %ld products of bfloat16, %ld products of bytes\n", loads, stores,
            bfloat_products, byte_products);
}
