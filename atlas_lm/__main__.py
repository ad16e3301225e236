"""python -m atlas_lm <command> [key=value ...]"""

import importlib

from atlas_lm.cli.arguments import HELP, call
from atlas_lm.config.names import nearest

COMMANDS = {  # each is a module of atlas_lm/cli with a `main(arguments)`; imported when it is asked for
    "generate": "continue a text with a trained model",
    "runs": "every run there is: its state, step, loss and age",
    "compare": "runs side by side, by chunk size",
    "calibrate": "the spike threshold that fits a run",
    "gates": "judge a run by the exit gates of its phase; measure and lock chunk sizes",
    "doctor": "what training will take of a GPU's memory, before it is queued",
    "evaluate": "what the memories of runs are worth: position, horizon, state, chunks, needles",
    "latent": "what a predictor of the next vector is worth: five tests, beside an oracle and baselines",
    "export": "a model for Hugging Face transformers, and back",
    "inspect": "what a model does while it generates: entropy, attention, memory health, flags",
    "prepare": "tokenize a corpus once, to shards for data=tokens",
    "embed": "embed the passages of a corpus once, for data=embeddings",
}


def usage() -> str:
    """What there is to call."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        ["usage: python -m atlas_lm <command> [key=value ...]", ""]
        + [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
        + ["", "python -m atlas_lm <command> --help shows its options. Training is python train.py +experiment=stage1."]
    )


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names. ValueError: there is none of that name."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in HELP:
        print(usage())
    elif name in COMMANDS:
        importlib.import_module(f"atlas_lm.cli.{name}").main(rest)
    elif name:
        raise ValueError(f"no command {name!r}{nearest(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    else:
        raise ValueError(f"give a command: {', '.join(COMMANDS)}; --help explains them")


if __name__ == "__main__":
    call(main)
