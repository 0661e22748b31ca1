"""Our models in EleutherAI's lm-evaluation-harness (lm-eval), under the name `retro`.

    python -m eval.harness --model retro --model_args pretrained=my.model,index=my.index,k=10 --tasks lambada_openai

is lm-eval's own command, which knows our models besides. In Python, `import eval.harness` comes before
`lm_eval.simple_evaluate(model="retro", ...)`.

The context of a log-likelihood and a prompt end on a chunk border (lead = -n mod M), so that they retrieve at once; the lead stays
for the continuation. A document scored as a whole (`loglikelihood_rolling`) has no lead; its windows are lm-eval's and stand on the
document's grid. Every finished chunk that the model has read is looked up by its text, and no other.

Requests are tokenized by lm-eval's code for `--model hf`, those to a RETROfitted model by its base's tokenizer; and with k = 0 that
code runs on the base: so the results are those of `--model hf` on it, if none of its weights were trained, in the same precision.

Letters as in retro/model.py; besides, N scored tokens.
"""

import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from index_builder.search import IndexRetriever
from retro.artifact import read_json
from retro.checkpoint import CONFIG
from retro.chunks import Passage
from retro.errors import ConfigError, DependencyError, FormatError, MismatchError, RetroError
from retro.generate import Lookup, Retriever, Role
from retro.hub import RetroForCausalLM
from retro.retrofit import load_retrofit
from retro.tokenizer import Tokenizer
from retro.train_setup import resolve_device

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.utils import get_rolling_token_windows
    from tqdm import tqdm
except ImportError as error:
    raise DependencyError(
        f"the lm-evaluation-harness cannot be imported ({error}): pip install 'retro-lm[eval]', which brings lm-eval[hf]"
    ) from error

logger = logging.getLogger(__name__)

OPTIONS = frozenset(
    (
        "add_bos_token",
        "chat_template_args",
        "enable_thinking",
        "logits_cache",
        "max_batch_size",
        "max_length",
        "prefix_token_id",
        "softmax_dtype",
        "think_end_token",
        "truncation",
        "trust_remote_code",
    )
)
"""Arguments that mean what they mean for `--model hf`."""
REMEMBERED = 4096
"""Texts whose passages are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tokens that the network reads to predict the last of them, and the one after."""

    ids: tuple[int, ...]
    before: int = 0
    """The first so many are not read: they give the text of chunks that a window begins in the middle of."""
    lead: int = 0
    """Empty slots before the first token."""
    targets: tuple[int, ...]
    """What the last len(targets) tokens are followed by [N]."""


class RetroLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """A model of ours, or a RETROfitted one, as a model of lm-eval."""

    def __init__(
        self,
        pretrained: str,
        index: str | None = None,
        k: int | None = None,
        retriever: str | Retriever = "dense",
        neighbor_len: int | None = None,
        where: str | None = None,
        tokenizer: str | None = None,
        device: str = "auto",
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        """Opens model and index.

        Args:
            pretrained: Folder of a model of ours, or of a RETROfitted one.
            index: Folder of an index; not needed where k is 0.
            k: Neighbors of a chunk; 0 turns retrieval off. Default: as config.json says.
            retriever: dense, bm25, hybrid or rerank; in Python also an object that retrieves.
            neighbor_len: Tokens of a neighbor that are read. Default: as config.json says.
            where: Only documents that fulfil this; a comma cannot be written in --model_args.
            tokenizer: Name or folder. Default: the base's, or the one in the model's folder.
            device: auto, cpu, cuda or cuda:N.
            batch_size: With retrieval a number.
            options: See OPTIONS.

        Raises:
            ConfigError: An argument is unknown or cannot work, or there is no index where one is needed.
            FormatError: Model or index is missing or damaged.
            MismatchError: The tokenizer has other tokens than the model.
        """
        info = read_json(Path(pretrained) / CONFIG) if (Path(pretrained) / CONFIG).is_file() else None
        if not isinstance(info, dict) or not {"num_neighbors", "neighbor_len", "training"} <= info.keys():
            raise FormatError(f"pretrained = {pretrained} is no folder of a model of ours (of others: --model hf)")
        if unknown := sorted(options.keys() - OPTIONS):
            raise ConfigError(
                f"model_args: {', '.join(unknown)} is unknown; besides ours: {', '.join(sorted(OPTIONS))}"
            )
        self._info: dict[str, Any] = info
        self._K: int = info["num_neighbors"] if k is None else k
        self._R: int = info["neighbor_len"] if neighbor_len is None else neighbor_len
        for name, value, least in (("k", self._K, 0), ("neighbor_len", self._R, 1)):
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} = {value}: give a whole number from {least} on")
        self._index, self._retriever, self._where = index, retriever, where
        if self._K:
            if index is None and isinstance(retriever, str):
                raise ConfigError(
                    f"k = {self._K} needs an index: add index=FOLDER to model_args, or k=0 for no retrieval"
                )
            if not str(batch_size).isdigit():
                raise ConfigError(f"batch_size = {batch_size}: with retrieval give a number")
        self._network: Any = None
        self._own_tokenizer: Tokenizer
        self._lookup: Lookup | None = None
        super().__init__(
            str(pretrained),
            backend="causal",
            tokenizer=tokenizer,
            device=str(resolve_device(device)),
            batch_size=batch_size,
            **options,
        )
        if options.get("max_length") is None and not self._fitted:
            self._max_length = info["training"].get("settings", {}).get("seq_len")

    @property
    def _fitted(self) -> bool:
        return "base" in self._info

    @property
    def _is_base(self) -> bool:
        """Whether the base is measured as it is."""
        return self._fitted and self._lookup is None

    def _get_config(self, pretrained: str, **_: Any) -> None:
        """Called as soon as the device is known: opens everything, for a base's configuration comes with it."""
        if self._K and isinstance(self._retriever, str):
            method: Any = self._retriever
            self._retriever = IndexRetriever.open(
                str(self._index), device=str(self._device), method=method, where=self._where
            )
        tokenizer: Tokenizer | None
        if self._fitted:
            self._network, tokenizer, _ = load_retrofit(Path(pretrained), device=self._device)
            self._model = self._network.base
        else:
            self._model = RetroForCausalLM.from_pretrained(pretrained).to(self._device)
            self._network, tokenizer = self._model.model, self._model.tokenizer
        if tokenizer is None:
            raise FormatError(f"{pretrained} holds no tokenizer.json: copy the whole folder again")
        self._config = self._model.config
        self._own_tokenizer = tokenizer
        if not self._K or isinstance(self._retriever, str):
            return
        remembering = Remembering(self._retriever)
        self._lookup = Lookup(tokenizer=tokenizer, retriever=remembering, num_neighbors=self._K, neighbor_len=self._R)
        if not self._fitted:
            self._model.config.neighbor_len = self._R
            self._model.set_retriever(remembering, self._K)

    def _create_model(self, *_: Any, **__: Any) -> None:
        """It is there already."""

    def _create_tokenizer(self, pretrained: str, tokenizer: Any, revision: str | None = "main", **options: Any) -> None:
        if tokenizer is None and self._fitted:
            tokenizer, revision = self._info["base"]["name"], self._info["base"]["revision"] or "main"
        try:
            super()._create_tokenizer(pretrained, tokenizer, revision=revision, **options)
        except (OSError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the tokenizer of {tokenizer or pretrained} cannot be opened: {first} Add tokenizer=FOLDER to model_args"
            ) from error
        given = self.tokenizer.get_vocab()
        own = self._own_tokenizer.backend.get_vocab(with_added_tokens=True)
        differing = sorted(token for token, number in own.items() if given.get(token) != number)
        if differing:
            raise MismatchError(
                f"the tokenizer of {tokenizer or pretrained} is not the model's: {len(differing):,} of {len(own):,} tokens have "
                f"other numbers or are missing ({', '.join(map(repr, differing[:3]))}). Leave tokenizer out of model_args"
            )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results. (Theirs asks the hub for a model of the folder's name.)"""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self._network.parameters()),
            "model_dtype": self._model.dtype,
            "tokenizer_fingerprint": self._own_tokenizer.fingerprint,
            "retrieval": {
                "k": self._K,
                "neighbor_len": self._R,
                "retriever": getattr(self._retriever, "method", None),
                "where": self._where,
                "index_fingerprint": getattr(self._retriever, "fingerprint", None),
            },
        }

    # --- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-probabilities (natural) of continuations, and whether every token is the most probable one.

        Args:
            requests: Of each the texts, and the tokens of context and continuation.
            disable_tqdm: Show no progress.
            options: Of lm-eval's own method.
        """
        if self._is_base:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)  # type: ignore[no-any-return]
        rows = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: it must have 1 to {self.max_length} "
                    "(max_length)"
                )
            kept = (context + continuation)[-(self.max_length + 1) :]
            lead = -(len(kept) - len(continuation)) % self._network.chunk_len
            rows.append(Row(ids=tuple(kept[:-1]), lead=lead, targets=tuple(continuation)))
        cut = sum(len(context) + len(cont) > self.max_length + 1 for _, context, cont in requests)
        if cut:
            logger.warning("%d of %d requests are cut on the left to %d tokens", cut, len(requests), self.max_length)
        answers = self._score(rows, disable_tqdm)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (natural) of whole documents, the first token predicted from BOS.

        Windows are those of `--model hf`: max_length tokens each, the last one overlapping. A window's first tokens see no
        neighbors, as the first chunk of a document does, for the chunk before is not read again.

        Args:
            requests: Of each `args` holds the text.
            disable_tqdm: Show no progress.
        """
        if self._is_base:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        M = self._network.chunk_len
        rows: list[Row] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            # A base's tokenizer may put a second BOS in front: that is what `--model hf` scores. Ours have one.
            tokens = self.tok_encode(text, add_special_tokens=None if self._fitted else False)
            ids = [self.prefix_token_id, *tokens]
            end = 0
            for read, targets in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                end += len(targets)
                start = end - len(read)
                # The chunk before is kept as well: it says where a character ends that is split between both.
                first = max(start // M - 1, 0) * M
                rows.append(Row(ids=tuple(ids[first:end]), before=start - first, targets=tuple(targets)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._score(rows, disable_tqdm), strict=True):
            sums[owner] += log_prob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _score(self, rows: Sequence[Row], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Answers for rows; those that differ in nothing but their last target are read once."""
        same: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(rows):
            same.setdefault((row.ids, row.before, row.lead, len(row.targets)), []).append(number)
        # Of like length, and the choices of a question beside each other, for they share chunks to look up.
        groups = sorted(same.values(), key=lambda group: (-len(rows[group[0]].ids), rows[group[0]].ids))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        size = int(self.batch_size) if str(self.batch_size).isdigit() else self.max_batch_size
        bar = tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for start in range(0, len(groups), size):
            batch = groups[start : start + size]
            for group, log_probs_NV in zip(batch, self._log_probs([rows[group[0]] for group in batch]), strict=True):
                best_N = log_probs_NV.argmax(dim=-1)
                for number in group:
                    targets_N = torch.tensor(rows[number].targets, device=log_probs_NV.device)
                    total = float(log_probs_NV.gather(1, targets_N[:, None]).sum())
                    answers[number] = total, bool((best_N == targets_N).all())
                bar.update(len(group))
        bar.close()
        return answers

    @torch.no_grad()
    def _log_probs(self, rows: Sequence[Row]) -> list[Tensor]:
        """Log-probabilities [N, V] after the last N tokens of each row, with the neighbors of all chunks that end in it."""
        M, device = self._network.chunk_len, self._device
        starts = [(row.lead + row.before) % M for row in rows]
        ends = [start + len(row.ids) - row.before for row, start in zip(rows, starts, strict=True)]
        L = -(-max(ends) // M)
        inputs_BT = torch.zeros(len(rows), L * M, dtype=torch.long)
        keep_BT = torch.zeros(len(rows), L * M, dtype=torch.bool)
        for b, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
            inputs_BT[b, start:end] = torch.tensor(row.ids[row.before :])
            keep_BT[b, start:end] = True
        found = None
        if self._lookup is not None:
            ids = [list(row.ids) for row in rows]
            found = self._lookup.neighbors(ids, [row.lead for row in rows], [row.before for row in rows], M)
        near = {}
        if found is not None:
            wide = [F.pad(x, (0, 0, 0, 0, 0, L - x.shape[1])).to(device) for x in found]
            near = {"neighbors_BLKR": wide[0], "keep_BLKR": wide[1]}
        hidden_BTD = self._network.hidden(inputs_BT.to(device), keep_BT=keep_BT.to(device), **near)
        log_probs = []
        for b, (row, end) in enumerate(zip(rows, ends, strict=True)):
            logits_NV = self._network.logits(hidden_BTD[b, end - len(row.targets) : end])
            # In the logits' own precision, as `--model hf` does, unless softmax_dtype says otherwise.
            log_probs.append(torch.log_softmax(logits_NV, dim=-1, dtype=self.softmax_dtype))
        return log_probs

    # --- generation

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Continues prompts [B, T], padded on the left, until each one holds a stop sequence."""
        if not self._fitted or self._lookup is None:
            return super()._model_generate(context, max_length, stop, **options)  # type: ignore[no-any-return]
        if not options.get("do_sample"):
            options.pop("temperature", None)
        continued: Tensor = self._network.generate(
            context,
            lookup=self._lookup,
            max_length=max_length,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **options,
        )
        return continued


class Remembering:
    """A retriever that keeps what it found: the choices of a question share most of their chunks."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self._known: dict[str, list[Passage]] = {}

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> list[list[Passage]]:
        """See `retro.generate.Retriever`; always asked with the same arguments but for the queries."""
        new = [query for query in queries if query not in self._known]
        if new:
            found = self.retriever.retrieve(new, k, role=role, exclude=exclude, where=where)
            self._known.update(zip(new, found, strict=True))
        passages = [self._known[query] for query in queries]
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return passages


def run(arguments: Sequence[str]) -> None:
    """The command of lm-eval.

    Args:
        arguments: Its own, as in `--model retro --model_args pretrained=DIR,index=DIR --tasks NAME`.

    Raises:
        ConfigError: lm-eval does not know the task.
    """
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise ConfigError(
            f"{error}. `lm_eval ls tasks` lists those that lm-eval knows; a YAML file or --include_path FOLDER adds others"
        ) from error


# By name, so that lm-eval opens the same module, whatever the name under which it was run.
if "retro" not in model_registry:
    model_registry.register("retro", target="eval.harness:RetroLM")

if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except RetroError as error:
        sys.exit(f"Error: {error}")
