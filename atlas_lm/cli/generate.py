"""Continue a text: prefill, then decode token by token on the constant-size state (M14).

python -m atlas_lm generate run=stage1 prompt="def "
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from atlas_lm.cli.arguments import parse
from atlas_lm.data.losses import count_losses
from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.model import sampling
from atlas_lm.model.session import Session
from atlas_lm.runs.load import load


@dataclass
class Options:
    """Continue a text with a trained model."""

    run: str
    """Run folder, experiment or checkpoint, for example run=stage1."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 256
    """Tokens to write."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 50
    """Tokens to draw from."""
    seed: int = 0
    """Of the draws."""
    state: str = ""
    """File of a state: continued if it is there; the state at the end is saved in it."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.top_k < 1 or not self.temperature >= 0:
            raise ValueError(
                f"tokens={self.tokens} and top_k={self.top_k} must be at least 1, "
                f"temperature={self.temperature} at least 0"
            )


def warn_of_losses(tokenizer: Tokenizer, prompt: str) -> None:
    """Say on stderr what the model does not get to see of a prompt."""
    raw = prompt.encode()
    losses = count_losses(raw, tokenizer.encode_batch(["the prompt"], [raw])[0].lost)
    if losses.unknown:
        what = f"{losses.unknown} of {losses.characters} characters of the prompt, such as {losses.examples!r}"
        print(f"warning: the tokenizer does not know {what}: the model does not see them", file=sys.stderr)


def main(arguments: list[str]) -> None:
    """Print the prompt and its continuation. ValueError: bad arguments, or a run that was not trained on text."""
    options = parse(Options, arguments, "python -m atlas_lm generate")
    model, tokenizer = load(options.run, options.outputs)
    warn_of_losses(tokenizer, options.prompt)
    o = options
    path = Path(o.state)
    session = Session.load(model, path) if o.state and path.exists() else model.stream()
    print(o.prompt + sampling.generate(model, tokenizer, o.prompt, o.tokens, o.temperature, o.top_k, o.seed, session))
    if o.state:
        session.save(path)
        print(f"saved the state after {session.age:,} tokens: {path}", file=sys.stderr)
