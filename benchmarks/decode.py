"""Token by token: time and state at early and late positions: python -m benchmarks.decode [--model tiny]

A model streams random bytes: a prefill up to each position, then single tokens. Time per token is the median over them;
the state is what the model carries from one call to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.config.model import ModelConfig
from atlas_lm.model.atlas import AtlasLM
from benchmarks import measuring
from benchmarks.train_step import VOCABULARY, model_values

PIECE = 1024  # tokens of one prefill call


def size_of(state: Any) -> int:
    """Bytes of all tensors in nested tuples."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(size_of(part) for part in state) if isinstance(state, tuple) else 0


@torch.inference_mode()
def main() -> None:
    parser = measuring.arguments("benchmarks.decode", __doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_deep", help="a file of conf/model")
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 1000, 16000])
    parser.add_argument("--tokens", type=int, default=64, help="decoded at each position, whole chunks among them")
    args = parser.parse_args()
    measuring.prepare()
    torch.manual_seed(0)
    model = AtlasLM(ModelConfig(**model_values(args.model)), VOCABULARY).to(args.device).eval()
    text = torch.randint(VOCABULARY, (1, max(args.positions)), device=args.device)
    states, state, done = {}, model.initial_state(1), 0
    for position in sorted(args.positions):
        while done < position:
            measuring.progress(f"prefill {done} / {max(args.positions)}")
            end = min(position, done + PIECE)
            state = model(text[:, done:end], state).state
            done = end
        states[position] = state
    times: dict[int, list[float]] = {position: [] for position in states}
    for round_ in range(args.repeats + 1):
        for position, state in states.items():
            measuring.progress(f"decode at {position}, round {round_}")
            now, found = state, []
            for _ in range(args.tokens):
                token = torch.randint(VOCABULARY, (1, 1), device=args.device)

                def one(token: Tensor = token) -> None:
                    nonlocal now
                    now = model(token, now).state
                    measuring.wait(args.device)

                found.append(measuring.seconds(one))
            if round_:  # the first is a warm-up
                times[position].append(sum(found) / len(found))
    first = min(times)
    rows = [
        {
            "name": args.model, "position": position, "milliseconds": 1e3 * sorted(found)[len(found) // 2],
            "ratio": sorted(found)[len(found) // 2] / sorted(times[first])[len(times[first]) // 2],
            "state_bytes": size_of(states[position]),
        }
        for position, found in times.items()
    ]  # fmt: skip
    columns = {
        "position": lambda row: f"{row['position']:,}",
        "ms per token": lambda row: f"{row['milliseconds']:.2f}",
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "state": lambda row: f"{row['state_bytes']:,} bytes",
    }
    measuring.publish(rows, columns, args.json)


if __name__ == "__main__":
    main()
