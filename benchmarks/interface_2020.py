"""A training step through the interface of 2020, the native API and a loop over time, interleaved.

    python benchmarks/interface_2020.py

All three are the same model: 784-500-500-10 over 25 steps, and 300-500-200-500-300 over 300 steps.
Writes the medians and their ratio to the native API.
"""

from measuring import interleave, machine, options, quartiles
from networks import DIGITS, LOOP, MEMORY, SNN, TimeLast, Variant

from snn_lib.files import write_csv

VARIANTS = Variant("native API", SNN), Variant("2020 interface", TimeLast), LOOP
ROUNDS, SECONDS = 8, 0.3  # visits to each variant, and how long one lasts at least


def main() -> None:
    chosen = options(__doc__, "interface_2020")
    rounds, seconds = (1, 0.0) if chosen.smoke else (ROUNDS, SECONDS)
    rows = []
    for network in (DIGITS, MEMORY):
        network = network.small() if chosen.smoke else network
        subjects = [(variant, network) for variant in VARIANTS]
        found = interleave(subjects, chosen, rounds, seconds, ["training"])
        medians = [quartiles(result["training"])[1] for result in found]
        for variant, median in zip(VARIANTS, medians, strict=True):
            row = {
                "network": str(network),
                "variant": variant.name,
                "training_ms": round(median, 1),
            }
            row |= {"training/native": round(median / medians[0], 2), "machine": machine(chosen)}
            rows.append(row)
            print(*row.values(), sep=", ")
    write_csv(chosen.output.with_suffix(".csv"), rows)


if __name__ == "__main__":
    main()
