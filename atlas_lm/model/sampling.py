"""Continue token sequences: prefill, then decode token by token on the state of constant size (M14)."""

# B batch, T tokens, V vocabulary

import torch
from torch import Tensor

from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.session import Session


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
def generate_tokens(
    model: AtlasLM,
    prompt_BT: Tensor,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    session: Session | None = None,
) -> Tensor:
    """Continue every prompt by `tokens` tokens: (B, T) → (B, tokens). The memory keeps learning while it writes.

    `session`: one that has read something already, and reads on; then the prompt may be empty. ValueError: it is empty,
    and nothing was read.
    """
    session = model.stream(prompt_BT.size(0)) if session is None else session
    if prompt_BT.size(1):
        session.read(prompt_BT)
    generator = torch.Generator(prompt_BT.device).manual_seed(seed)
    written = []
    for _ in range(tokens):
        if session.logits is None:
            raise ValueError("the prompt is empty: give at least one token")
        written.append(draw(session.logits, temperature, top_k, generator))
        session.read(written[-1])
    return torch.cat(written, dim=1)


def generate(
    model: AtlasLM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    session: Session | None = None,
) -> str:
    """The continuation of a prompt as text; an empty prompt starts a document, or continues `session`'s."""
    start = [tokenizer.separator_id] if session is None or not session.age else []
    ids = torch.tensor([[*start, *(int(i) for i in tokenizer.encode(prompt))]], dtype=torch.int64)
    new = generate_tokens(model, ids.to(model.embed.weight.device), tokens, temperature, top_k, seed, session)
    return tokenizer.decode(new[0].cpu().numpy())
