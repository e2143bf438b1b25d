#include <stdint.h>

/* Prints by the emulator. */
void print(const char *text);
void print_number(uint32_t number);

/* A clock of 24 bits, of 25 MHz on this board. QEMU with -icount shift=0 runs 40 instructions in a
   tick: it takes each to last a nanosecond. */
#define INSTRUCTIONS_A_TICK 40
uint32_t ticks(void);
