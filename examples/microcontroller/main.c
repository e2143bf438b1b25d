/* Classifies some digits, each until one class is two spikes ahead of all others. */

#include <stdint.h>

#include "network.h"
#include "samples.h"
#include "start.h"

#define LEAD ((network_output)(2 / NETWORK_LEAD_SCALE)) /* two spikes */

static network_state state; /* one for each stream; it is large for a stack */

static void classify(int32_t sample)
{
    network_input x[NETWORK_INPUTS];
    network_output y[NETWORK_OUTPUTS];
    uint32_t total = 0;
    int32_t step = 0;

    network_reset(&state);
    do {
        for (int32_t n = 0; n < NETWORK_INPUTS; n++)
            x[n] = spikes[sample][step][n / 8] >> n % 8 & 1;
        const uint32_t begin = ticks();
        network_step(&state, x, y);
        total += (ticks() - begin) & 0xFFFFFF;
        step++;
    } while (step < STEPS && network_lead(&state) < LEAD);

    print("a ");
    print_number(labels[sample]);
    print(" is read as ");
    print(network_classes[network_class(&state)]);
    print(" after ");
    print_number((uint32_t)step);
    print(" steps and ");
    print_number(INSTRUCTIONS_A_TICK * total);
    print(" instructions\n");
    if (state.saturated)
        print("some values did not fit: give quantise samples that reach farther\n");
}

int main(void)
{
    for (int32_t sample = 0; sample < SAMPLES; sample++)
        classify(sample);
    return 0;
}
