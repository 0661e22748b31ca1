"""Sentence encoders that are a BERT and a pooling, as the default one and most small ones are, without sentence-transformers.

Importing that takes seconds, for which everybody would wait who asks one question. A folder that says anything else than what is
understood here is left to sentence-transformers.

Letters: B texts of a batch, T tokens of each, E width of the network, X of a vector.
"""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from retro.bert import Bert

logger = logging.getLogger(__name__)
_KINDS = ("Transformer", "Pooling", "Normalize")
_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_NORMALIZING = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_POOLING_KEYS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"}
_BERT_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast")
"""transformers makes these anew out of the settings; the others are what `tokenizer.json` says."""
_TOKENIZERS = (*_BERT_TOKENIZERS, "PreTrainedTokenizerFast", "TokenizersBackend")
_DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}
"""What transformers takes where a configuration does not say it."""


class Transformer(nn.Module):
    """Token ids to states."""

    def __init__(self, model: Bert, config: SimpleNamespace, tokenizer: SimpleNamespace) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._config = config

    @property
    def auto_model(self) -> Any:
        """What has the `config` of transformers."""
        return SimpleNamespace(config=self._config)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        ids_BT, keep_BT = features["input_ids"], features["attention_mask"].bool()
        embeddings: Any = self.model.embeddings
        place_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        segment_BT = features.get("token_type_ids")
        states_BTE = self.model(
            embeddings["word_embeddings"](ids_BT),
            None if bool(keep_BT.all()) else keep_BT,
            place_1T,
            torch.zeros_like(place_1T) if segment_BT is None else segment_BT,
        )
        return {**features, "token_embeddings": states_BTE}


class Pooling(nn.Module):
    """States to one vector a text: their mean, or the first."""

    include_prompt = True

    def __init__(self, pooling_mode: str) -> None:
        super().__init__()
        self.pooling_mode = pooling_mode

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states_BTE: Tensor = features["token_embeddings"]
        if self.pooling_mode == "cls":
            vectors_BX = states_BTE[:, 0]
        else:
            keep_BT1 = features["attention_mask"][..., None].to(states_BTE.dtype)
            vectors_BX = (states_BTE * keep_BT1).sum(dim=1) / keep_BT1.sum(dim=1).clamp(min=1e-9)
        return {**features, "sentence_embedding": vectors_BX}


class Normalize(nn.Module):
    """Vectors to length 1."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": F.normalize(features["sentence_embedding"], p=2, dim=1)}


class SentenceBert(nn.Sequential):
    """What `index_builder.encoder.Encoder` uses of a SentenceTransformer, whose names its attributes have."""

    truncate_dim: None = None

    def __init__(
        self,
        modules: list[nn.Module],
        prompts: dict[str, str],
        max_seq_length: int,
        dim: int,
    ) -> None:
        super().__init__(*modules)
        self.prompts, self.max_seq_length = prompts, max_seq_length
        self._dim = dim

    @property
    def tokenizer(self) -> Any:
        """With `backend_tokenizer` and `pad_token_id`."""
        return self[0].tokenizer

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def get_embedding_dimension(self) -> int:
        """X."""
        return self._dim

    def preprocess(self, texts: list[str], *, prompt: str = "", **_: Any) -> dict[str, Any]:
        """Tokens of one text, as a batch."""
        backend = tokenizers.Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.enable_truncation(self.max_seq_length)
        (encoding,) = backend.encode_batch([prompt + text for text in texts])
        made = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        return {name: torch.tensor([values]) for name, values in made.items()}

    def forward(self, input: Any, **_: Any) -> Any:
        for module in self:
            input = module(input)
        return input


def open_bert(folder: Path, device: str) -> SentenceBert | None:
    """Opens the encoder in a folder of sentence-transformers; None where it is, or may be, something else than described above."""
    try:
        return _opened(folder, device)
    except Exception as error:  # the libraries raise nearly everything; what is wrong, sentence-transformers says
        logger.debug("%s: %s", folder, error)
        return None


def _opened(folder: Path, device: str) -> SentenceBert | None:
    modules, said = _json(folder / "modules.json"), _json(folder / "config.json")
    config = _DEFAULTS | said
    kinds = tuple(module["type"].split(".")[-1] for module in modules)
    if kinds not in (_KINDS[:2], _KINDS) or any(
        not module["type"].startswith("sentence_transformers.") or module.keys() - {"idx", "name", "path", "type"}
        for module in modules
    ):
        return None
    reading, own = _json(folder / "sentence_bert_config.json"), _json(folder / "config_sentence_transformers.json", {})
    pooling, tokenizing = _json(folder / modules[1]["path"] / "config.json"), _json(folder / "tokenizer_config.json")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    mode = _pooling_mode(pooling)
    understood = (
        modules[0]["path"] == ""
        and config["model_type"] == "bert"
        and (config["hidden_act"], config["position_embedding_type"]) == ("gelu", "absolute")
        and config["type_vocab_size"] == 2
        and not any(config.get(key) for key in ("is_decoder", "add_cross_attention", "auto_map", "quantization_config"))
        and reading.keys() <= {"max_seq_length", "do_lower_case"}
        and not reading.get("do_lower_case")
        and isinstance(reading["max_seq_length"], int)
        and 3 <= reading["max_seq_length"] <= config["max_position_embeddings"]
        and own.keys()
        <= {"__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim"}
        and own.get("default_prompt_name") is None
        and own.get("truncate_dim") is None
        and mode is not None
        and not (folder / "adapter_config.json").exists()
        and (len(kinds) < 3 or _json(folder / modules[2]["path"] / "config.json", {}).items() <= _NORMALIZING.items())
        and not _json(folder / "added_tokens.json", {})
        and _tokenizes_alike(tokenizing | _json(folder / "special_tokens_map.json", {}), backend)
    )
    if not understood:
        return None
    prompts = {"query": "", "document": ""} | {key: str(value) for key, value in (own.get("prompts") or {}).items()}
    model = _network(config, folder / "model.safetensors", device)
    if model is None or mode is None:
        return None
    known = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "max_position_embeddings")
    pad = tokenizing.get("pad_token")
    pad_id = backend.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad is not None else None
    tokenizer = SimpleNamespace(backend_tokenizer=backend, pad_token_id=pad_id)
    shape = SimpleNamespace(**{key: config[key] for key in known})
    shape.position_embedding_type = said.get("position_embedding_type")
    parts: list[nn.Module] = [Transformer(model, shape, tokenizer), Pooling(mode)]
    if len(kinds) == 3:
        parts.append(Normalize())
    return SentenceBert(parts, prompts, reading["max_seq_length"], config["hidden_size"])


def _json(path: Path, missing: Any = None) -> Any:
    if missing is not None and not path.is_file():
        return missing
    return json.loads(path.read_bytes())


def _pooling_mode(pooling: dict[str, Any]) -> str | None:
    """The one pooling that is wanted, if it is one of those here; a width that it states is the network's."""
    flags = {key for key in pooling if key.startswith("pooling_mode_")}
    if not pooling.get("include_prompt", True) or pooling.keys() - flags - _POOLING_KEYS:
        return None
    if "pooling_mode" in pooling:
        mode = pooling["pooling_mode"]
        return mode if mode in _POOLINGS.values() else None
    wanted = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    return _POOLINGS.get(wanted[0]) if len(wanted) == 1 else None


def _tokenizes_alike(settings: dict[str, Any], backend: tokenizers.Tokenizer) -> bool:
    """Whether transformers' tokenizer would be the one of `tokenizer.json` as it is."""
    content = json.loads(backend.to_str())
    known = {token["content"]: token["special"] for token in content["added_tokens"]}  # others would be added
    named = [settings[key] for key in settings if key.endswith("_token")]
    special = [token["content"] if isinstance(token, dict) else token for token in named if token]
    added = [token["content"] for token in (settings.get("added_tokens_decoder") or {}).values()]
    return (
        settings.get("tokenizer_class") in _TOKENIZERS
        and settings.get("truncation_side", "right") == "right"
        and not settings.get("split_special_tokens")
        and not any(settings.get(key) for key in ("auto_map", "additional_special_tokens", "extra_special_tokens"))
        and all(known.get(token) for token in special)
        and all(token in known for token in added)
        and (settings["tokenizer_class"] not in _BERT_TOKENIZERS or _is_bert(settings, content, backend))
    )


def _is_bert(settings: dict[str, Any], content: dict[str, Any], backend: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer is what transformers makes of such settings."""
    unpadded = tokenizers.Tokenizer.from_str(backend.to_str())
    unpadded.no_padding()
    ids = unpadded.encode("a").ids
    return (
        content["normalizer"]
        == {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case", True),
        }
        and content["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and content["model"]["type"] == "WordPiece"
        and len(ids) == 3
        and (ids[0], ids[2]) == (backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]"))
    )


def _network(config: dict[str, Any], weights: Path, device: str) -> Bert | None:
    """The network with its weights; None where the file holds more or less."""
    dim = config["hidden_size"]
    with torch.device("meta"):
        model = Bert(
            dim=dim,
            ffw_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_layers=config["num_hidden_layers"],
            positions=config["max_position_embeddings"],
            eps=config["layer_norm_eps"],
        )
        model.embeddings["word_embeddings"] = nn.Embedding(config["vocab_size"], dim)
        model.pooler = nn.ModuleDict({"dense": nn.Linear(dim, dim)})  # unused; a part of what is published
    state, wanted = load_file(weights, device=device), model.state_dict()
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and any(str(tensor.dtype) != f"torch.{dtype}" for tensor in state.values()):
        return None  # transformers would turn them into what is said
    state.pop("embeddings.position_ids", None)  # places in their order, in older files
    if state.keys() != wanted.keys() or any(state[name].shape != tensor.shape for name, tensor in wanted.items()):
        return None
    model.load_state_dict(state, assign=True)
    return model
