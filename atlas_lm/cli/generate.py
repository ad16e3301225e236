"""Continue a text: prefill, then decode token by token on the constant-size state (SPEC M14).

python -m atlas_lm.cli.generate run=stage1 prompt="def "
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atlas_lm.checkpoints.io import build_module, read_checkpoint
from atlas_lm.cli.arguments import call, parse
from atlas_lm.data.losses import count_losses
from atlas_lm.data.run_tokenizer import ARGUMENT, tokenizer_of
from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.model.atlas import AtlasLM, State
from atlas_lm.runs.folder import resolve_checkpoint, resolve_run


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
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.top_k < 1 or not self.temperature >= 0:
            raise ValueError(
                f"tokens={self.tokens} and top_k={self.top_k} must be at least 1, "
                f"temperature={self.temperature} at least 0"
            )


def draw(logits_BV: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token per sequence (B, 1) from the `top_k` likeliest; temperature 0 takes the likeliest.

    FloatingPointError: logits that are not finite.
    """
    if not bool(logits_BV.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite: choose an earlier checkpoint")
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    values, tokens = logits_BV.float().topk(min(top_k, logits_BV.size(-1)), dim=-1)
    choice = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(-1, choice)


@torch.inference_mode()
def generate(
    model: AtlasLM, prompt_BT: Tensor, tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Tensor:
    """Continue every prompt by `tokens` tokens: (B, T) → (B, tokens). The memory keeps learning while it writes."""
    if prompt_BT.size(1) < 1:
        raise ValueError("the prompt is empty: give at least one token")
    generator = torch.Generator(prompt_BT.device).manual_seed(seed)
    state: State | None = model.initial_state(prompt_BT.size(0))
    output = model(prompt_BT, state)
    written = []
    for _ in range(tokens):
        token = draw(output.logits[:, -1], temperature, top_k, generator)
        written.append(token)
        output = model(token, output.state)
    return torch.cat(written, dim=1)


def continue_text(
    model: AtlasLM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The continuation of a prompt as text; an empty prompt starts a document."""
    ids = [tokenizer.separator_id, *(int(i) for i in tokenizer.encode(prompt))]
    device = model.embed.weight.device
    new = generate(model, torch.tensor([ids], device=device), tokens, temperature, top_k, seed)
    return tokenizer.decode(new[0].cpu().numpy())


def load(path: Path) -> AtlasLM:
    """The model of a checkpoint, in eval mode."""
    checkpoint = read_checkpoint(path)
    module = build_module(checkpoint, path)
    if checkpoint.get("local_chunks"):
        module.set_local_chunks(checkpoint["local_chunks"])
    return module.model.eval()


def warn_of_losses(tokenizer: Tokenizer, prompt: str) -> None:
    """Say on stderr what the model does not get to see of a prompt."""
    raw = prompt.encode()
    losses = count_losses(raw, tokenizer.encode_batch(["the prompt"], [raw])[0].lost)
    if losses.unknown:
        what = f"{losses.unknown} of {losses.characters} characters of the prompt, such as {losses.examples!r}"
        print(f"warning: the tokenizer does not know {what}: the model does not see them", file=sys.stderr)


def main(arguments: list[str]) -> None:
    """Print the prompt and its continuation. ValueError: bad arguments, or a run that was not trained on text."""
    options = parse(Options, arguments, "python -m atlas_lm.cli.generate")
    checkpoint = resolve_checkpoint(options.run, options.outputs)
    run = checkpoint.parent.parent if Path(options.run).is_file() else resolve_run(options.run, options.outputs)
    content = read_checkpoint(checkpoint, lazily=True)
    tokenizer = tokenizer_of(run, content.get("hyper_parameters", {}).get(ARGUMENT))
    model = load(checkpoint)
    if tokenizer.vocab_size != model.embed.num_embeddings:
        raise ValueError(
            f"run {str(run)!r} has a vocabulary of {model.embed.num_embeddings}, its tokenizer {tokenizer.vocab_size}: "
            "it was not trained on text, or its tokenizer has changed since; choose another run"
        )
    warn_of_losses(tokenizer, options.prompt)
    o = options
    text = continue_text(model, tokenizer, o.prompt, o.tokens, o.temperature, o.top_k, o.seed)
    print(options.prompt + text)


if __name__ == "__main__":
    call(main)
