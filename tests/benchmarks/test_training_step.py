"""The training step's benchmark runs, in a tiny setting, and writes what it says."""


def test_training_step_compares_every_variant_on_every_network(tmp_path, run_smoke):
    rows, printed = run_smoke("training_step", tmp_path)
    networks = {row["network"] for row in rows}
    assert len(networks) == 3  # made small, two are the same
    assert {"nn.GRU", "nn.LSTM"} <= {row["variant"] for row in rows}
    for network in networks:
        measured = {(r["variant"], r["precision"]) for r in rows if r["network"] == network}
        assert measured >= {
            (variant, precision)
            for variant in (
                "SNN-IIR cpu",
                "per-step loop",
                "dense floor",
                "dense floor, no input gradient",
                "dense floor, allocator as it is",
            )
            for precision in ("float32", "bfloat16")
        } | {("SNN-IIR eager", "float32")}
    for row in rows:
        assert row["variant"] in printed
        assert float(row["training_q25"]) <= float(row["training_ms"]) <= float(row["training_q75"])
        assert float(row["inference_ms"]) > 0
        assert "1 threads" in row["machine"]
    floor = next(r for r in rows if (r["variant"], r["precision"]) == ("dense floor", "float32"))
    assert float(floor["training/floor"]) == float(floor["inference/floor"]) == 1
