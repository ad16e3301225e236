"""Continue token sequences: prefill, then decode token by token on the state of constant size (M14)."""

# B batch, T tokens, V vocabulary

import torch
from torch import Tensor

from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.model.atlas import AtlasLM, State


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


def generate(
    model: AtlasLM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The continuation of a prompt as text; an empty prompt starts a document."""
    ids = [tokenizer.separator_id, *(int(i) for i in tokenizer.encode(prompt))]
    device = model.embed.weight.device
    new = generate_tokens(model, torch.tensor([ids], device=device), tokens, temperature, top_k, seed)
    return tokenizer.decode(new[0].cpu().numpy())
