"""A language model with a memory that learns from what it reads, for Hugging Face transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`forward` without a cache reads whole sequences, as in training. With one it streams: the cache is the state of the
memories and of the attention's window, of constant size however long the text. `generate` does so.
"""

# B batch, T tokens, V vocabulary

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from atlas_lm.config.model import ModelConfig
from atlas_lm.exchange.hugging_face.configuration_atlas import AtlasConfig
from atlas_lm.memory.features import Monomials
from atlas_lm.model.atlas import AtlasLM, detach_state
from atlas_lm.model.session import PIECE

# what this version of transformers calls it
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"


class AtlasCache:
    """The state of streams after `seen` tokens. Reading gives a new one; an old one stays usable."""

    def __init__(self, state: Any, seen: int) -> None:
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search asks for."""
        self.state = _rows(self.state, beam_idx)


def _rows(value: Any, index: Tensor) -> Any:
    """Rows of every tensor that has a batch; `valid` slots of the attention have none."""
    if isinstance(value, Tensor):
        return value if value.dim() < 2 else value.index_select(0, index.to(value.device))
    if isinstance(value, tuple):
        parts = [_rows(part, index) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class AtlasForCausalLM(PreTrainedModel, GenerationMixin):
    """See the module."""

    config_class = AtlasConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # a state cannot go back to a shorter text
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        self.model = AtlasLM(ModelConfig(**config.model), config.vocab_size)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: modules initialise themselves as they are made."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **named: Any) -> Any:
        """As transformers has it; what is no weight and in no file is computed again."""
        found = super().from_pretrained(*arguments, **named)
        model = found[0] if isinstance(found, tuple) else found
        for module in model.modules():
            if isinstance(module, Monomials):
                module.reset_parameters()
        return found

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> Any:
        """The one matrix of embeddings, in and out."""
        return self.model.embed

    def get_output_embeddings(self) -> None:
        """None: the logits are products with the embeddings."""
        return

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: AtlasCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) after each token, or after the last `logits_to_keep`.

        With `use_cache` or a cache it streams. `labels` (B, T): the tokens themselves, −100 where they do not count.
        ValueError: a mask that hides tokens, since a memory learns whatever it reads.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask hides tokens, and a memory learns whatever it reads: give sequences of one length, "
                "without padding, or one at a time"
            )
        before = cache if cache is not None else others.get("past_key_values")
        if before is None and not use_cache:
            after: Any = None
            logits = self.model(input_ids).logits
        else:
            before = before or AtlasCache(self.model.initial_state(input_ids.size(0)), 0)
            state, parts = before.state, []
            for piece in input_ids.split(PIECE, dim=1):  # what a call needs does not grow with the text
                output = self.model(piece, state)
                state = output.state if torch.is_grad_enabled() else detach_state(output.state)
                parts.append(output.logits)
            logits, after = torch.cat(parts, dim=1), AtlasCache(state, before.seen + input_ids.size(1))
        loss = None
        if labels is not None:
            loss = nnf.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss, logits[:, -logits_to_keep:], **{CACHE: after})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Any = None, attention_mask: Any = None, **others: Any
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen."""
        before = cache if cache is not None else others.get("past_key_values")
        new = input_ids if before is None else input_ids[:, before.seen :]
        return {
            "input_ids": new, CACHE: before, "use_cache": True, "attention_mask": attention_mask,
        }  # fmt: skip

    def _reorder_cache(self, cache: AtlasCache, beam_idx: Tensor) -> AtlasCache:
        return AtlasCache(_rows(cache.state, beam_idx), cache.seen)
