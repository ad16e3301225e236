"""The configuration of an exported model."""

from typing import Any

from transformers import PretrainedConfig


class AtlasConfig(PretrainedConfig):
    """`model`: the settings of the model, as conf/model of atlas-lm has them; `local_chunks` those that training came
    to."""

    model_type = "atlas_lm"

    def __init__(self, model: dict[str, Any] | None = None, vocab_size: int = 0, **others: Any) -> None:
        self.model = model or {}
        self.vocab_size = vocab_size
        self.hidden_size = self.model.get("dim", 0)
        self.num_hidden_layers = self.model.get("layers", 0)
        self.num_attention_heads = self.model.get("heads", 0)
        others.setdefault("tie_word_embeddings", False)  # there is one matrix, and no second name for it
        super().__init__(**others)
