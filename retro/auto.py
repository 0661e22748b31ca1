"""What the Auto classes of transformers need to know: the configuration, and the network's class when one is made.

Imported by the hook in `retro/__init__.py` while transformers is being imported: nothing here may need torch.
"""

import importlib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from retro.config import PRESETS, GenerateConfig, ModelConfig, config_from_dict, config_to_dict

_DEFAULTS = GenerateConfig()


class RetroConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The content of a model's config.json.

    Attributes:
        model: Fields of retro.config.ModelConfig (or one; default: the preset tiny). Unknown and missing keys are errors.
        num_neighbors: K at every chunk border while generating; 0 turns retrieval off.
        neighbor_len: R.
        tokenizer_fingerprint: Of the tokenizer it was trained with.
        training: Figures of the training, for the model card.
    """

    model_type = "retro"

    model: Any = None
    num_neighbors: int = _DEFAULTS.num_neighbors
    neighbor_len: int = _DEFAULTS.neighbor_len
    tokenizer_fingerprint: str = ""
    training: Any = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Raises ConfigError where `model` is no ModelConfig."""
        model = PRESETS["tiny"].model if self.model is None else self.model
        if not isinstance(model, ModelConfig):
            model = config_from_dict(ModelConfig, model, where="config.json: model")
        self.model = config_to_dict(model)
        self.training = self.training or {}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        # Whoever has a configuration may next ask AutoModelForCausalLM for its network. It is registered only now, because
        # modules that it needs import the Auto classes themselves, whose import is where the configuration is registered.
        importlib.import_module("retro.hub")

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written: everything, for a file that says all of the network does not change its meaning with a default."""
        plain: dict[str, Any] = self.to_dict()
        return plain

    @property
    def network(self) -> ModelConfig:
        """The network's sizes."""
        return config_from_dict(ModelConfig, self.model, where="config.json: model")

    @property
    def vocab_size(self) -> int:
        """By the names that transformers use for all models; so are the next ones."""
        return int(self.model["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.model = {**self.model, "vocab_size": value}

    @property
    def hidden_size(self) -> int:
        return int(self.model["dim"])

    @property
    def num_hidden_layers(self) -> int:
        return int(self.model["num_layers"])

    @property
    def num_attention_heads(self) -> int:
        return int(self.model["num_heads"])


def register() -> None:
    """Makes AutoConfig know our models."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(RetroConfig.model_type, RetroConfig, exist_ok=True)
