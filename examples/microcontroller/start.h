#include <stdint.h>

/* Prints by the emulator. */
void print(const char *text);
void print_number(uint32_t number);

/* A clock of 24 bits. Under QEMU with -icount shift=0 it ticks once in 40 instructions. */
uint32_t ticks(void);
