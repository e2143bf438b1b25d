/* What a program without an operating system needs on the emulated board: a vector table, memory
   that is set up, and a way to print. For a board of your own, take what its maker supplies. */

#include <stdint.h>
#include <string.h>

#include "start.h"

extern uint32_t data_begin[], data_end[], data_source[], bss_begin[], bss_end[], stack_top[];
int main(void);

/* Asks the emulator, or a debugger, for a service: "semihosting". */
static void ask(uint32_t service, const void *argument)
{
    register uint32_t r0 __asm("r0") = service;
    register const void *r1 __asm("r1") = argument;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

void print(const char *text)
{
    ask(0x04, text);
}

void print_number(uint32_t number)
{
    char digits[11], *first = digits + sizeof digits - 1;
    *first = 0;
    do
        *--first = (char)('0' + number % 10);
    while (number /= 10);
    print(first);
}

static volatile uint32_t *const systick = (volatile uint32_t *)0xE000E010;

uint32_t ticks(void)
{
    return 0xFFFFFF - systick[2];
}

static void reset(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xFU << 20; /* switches the floating-point unit on */
    __asm volatile("dsb\n\tisb");
    memcpy(data_begin, data_source, (size_t)((char *)data_end - (char *)data_begin));
    memset(bss_begin, 0, (size_t)((char *)bss_end - (char *)bss_begin));
    systick[1] = 0xFFFFFF; /* counts down from here, at the clock of the processor */
    systick[2] = 0;
    systick[0] = 5;
    main();
    ask(0x18, (void *)0x20026); /* ends the emulation */
    for (;;)
        ;
}

static void fault(void)
{
    print("fault\n");
    ask(0x18, (void *)0x20023);
    for (;;)
        ;
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] = {
    stack_top, reset, fault, fault, fault, fault, fault,
};
