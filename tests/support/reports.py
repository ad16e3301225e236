"""A small report with something in every part."""

from atlas_lm.inspection import schema


def a_report(name: str = "tiny", steps: int = 4) -> schema.Report:
    """Of a model with two layers, two heads and one memory."""
    rows = range(steps)
    per_layer = [[1.0 + 0.1 * i, 0.5] for i in rows]
    columns = {
        "entropy_mean": per_layer, "entropy_min": per_layer, "entropy_max": per_layer, "concentration_mean": per_layer,
        "concentration_max": per_layer, "collapsed": [[0, 1]] * steps, "focused": [[1, 0]] * steps,
        "norm": [[3.0 + i, 4.0] for i in rows], "nonfinite": [[0, 0]] * steps,
    }  # fmt: skip
    return schema.Report(
        id=f"{name}-0001", created="2026-11-27T20:00:00+00:00", version="0.2.0",
        model=schema.ModelInfo(
            kind="atlas_lm", name=name, parameters=1000, layers=2, heads=2, vocabulary=257,
            memories=["layer 1 global"],
        ),
        settings=schema.Settings(
            capture="full", layers=[0, 1], every=1, tokens=steps, temperature=0.8, top_k=50, top_p=1.0, seed=0
        ),
        prompt=schema.Prompt(
            text="def f", tokens=["d", "ef", " f"], surprisal_bits=[3.0, 2.0], entropy_mean=[1.0, 2.0],
            concentration_mean=[0.5, 0.4], seen_keys=[[2.0, 3.0], [1.0, 1.5]], basin=[[1.0, 0.9], [1.1, 0.8]],
            transformation=[0.3], norm=[5.0, 6.0], nonfinite=[0, 0],
        ),
        text=" (x):" + "\n" * (steps - 4),
        steps=schema.Steps(
            token_ids=[40 + i for i in rows], tokens=([" ", "(", "x", "):"] + ["\n"] * steps)[:steps],
            entropy_bits=[2.0 + i for i in rows], surprisal_bits=[1.0 + i for i in rows],
            perplexity=[4.0 * 2**i for i in rows], margin=[0.5] * steps, top_k_mass=[0.9] * steps,
            top_tokens=[["a", "b"]] * steps, top_probabilities=[[0.6, 0.1]] * steps, repetition_period=[0] * steps,
            repetition_tokens=[0] * steps, repetition_cosine=[None] * steps, latency_seconds=[0.01] * steps,
            forward_seconds=[0.008] * steps, capture_seconds=[0.001] * steps,
        ),
        layers=schema.LayerColumns(
            steps=list(rows), **columns, head_entropy=[[1.0, 1.2], [0.4, 0.6]],
            head_concentration=[[0.5, 0.4], [0.8, 0.9]],
        ),
        memory=schema.MemoryColumns(
            labels=["layer 1 global"], chunks=[1], steps=[0, steps - 1], weight_norm=[[1.0], [1.5]],
            relative_change=[[None], [0.1]], write_strength=[[0.5], [0.6]], half_life=[[900.0], [800.0]],
            saturated_gates=[[0.1], [0.1]], output_ratio=[[0.4], [0.5]], radius_share=[[0.01], [0.02]],
            effective_rank=[[3.0], [4.0]], lags=[0, 64], residual=[[[0.2, None]], [[0.3, 0.7]]],
        ),
        latency=schema.Latency(
            total=0.05, time_to_first_token=0.02, inter_token_mean=0.01,
            by_operation={"forward": 0.04, "capture": 0.004},
        ),
        summary={"mean_entropy_bits": 3.5, "mean_margin": 0.5},
        baselines=schema.Baselines(
            sequence_log2_probability=-10.0, perplexity=5.66, mean_entropy_bits=3.5, max_entropy_bits=5.0
        ),
        flags=[
            schema.Flag(
                name="high_entropy", fired=True, value=0.25, threshold=0.2, steps=[3],
                message="1 of 4 steps above 4 bits",
            ),
            schema.Flag(name="nonfinite", fired=False, value=0, threshold=0, steps=[]),
        ],
        thresholds={"high_entropy_bits": 4.0},
        warnings=["a warning"],
    )  # fmt: skip
