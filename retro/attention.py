"""Attention: projections, positions, masks. Letters as in model.py."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from retro.config import Positions

KeysValues = tuple[Tensor, Tensor]
"""Each [B, H, S, C]."""
DENSE_SLOTS = 64
"""Sequences of so many slots or fewer are masked whole: calls for each of their segments would cost more than they save."""


class Places(NamedTuple):
    """Where queries or keys stand, and the rotary angles of these positions (Su et al. 2021, arXiv:2104.09864)."""

    at_T: Tensor
    """Positions [T], or [B, T] where rows differ."""
    cos: Tensor | None
    """[T, C/2] or [B, 1, T, C/2]; None without rotation."""
    sin: Tensor | None
    low: int
    """No position is lower."""
    high: int
    """None is higher."""

    @classmethod
    def of(cls, at_T: Tensor, low: int, high: int, attention: "Attention", dtype: torch.dtype) -> "Places":
        """Angles in float64, so that the result is exact in every dtype."""
        if attention.positions != "rotary":
            return cls(at_T, None, None, low, high)
        C = attention.head_dim
        exponents_C2 = torch.arange(0, C, 2, device=at_T.device, dtype=torch.float64) / C
        angles_TC2 = at_T.to(torch.float64)[..., None] * attention.base**-exponents_C2
        if at_T.ndim == 2:
            angles_TC2 = angles_TC2[:, None]
        return cls(at_T, angles_TC2.cos().to(dtype), angles_TC2.sin().to(dtype), low, high)

    @classmethod
    def range(cls, start: int, end: int, attention: "Attention", like: Tensor, repeat: int = 1) -> "Places":
        """Positions start, ..., end - 1, so many times over."""
        at_T = torch.arange(start, end, device=like.device).repeat(repeat)
        return cls.of(at_T, start, end - 1, attention, like.dtype)

    def rotated(self, x_BHTC: Tensor) -> Tensor:
        """Queries or keys turned by the angles of their positions; as they are where there are none."""
        if self.cos is None or self.sin is None:
            return x_BHTC
        first, second = x_BHTC.chunk(2, dim=-1)
        turned = torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)
        return turned.to(x_BHTC.dtype)


def attend(
    q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, keep_B1TS: Tensor, bias_BHTS: Tensor | None = None
) -> Tensor:
    """Softmax attention in which a query that may see nothing gets exactly zero.

    Args:
        q_BHTC: Queries.
        k_BHSC: Keys; finite everywhere, also where they are masked.
        v_BHSC: Values; likewise.
        keep_B1TS: Boolean, True where query t may see key s; any axis may be 1.
        bias_BHTS: Added to the logits.
    """
    empty_B1T1 = ~keep_B1TS.any(dim=-1, keepdim=True)
    mask = keep_B1TS | empty_B1T1
    if bias_BHTS is not None:
        mask = bias_BHTS.masked_fill(~mask, -torch.inf)
    y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=mask)
    return y_BHTC.masked_fill(empty_B1T1, 0.0)


class Attention(nn.Module):
    """The projections that self-attention, CCA and the encoder's cross-attention share, and their knowledge of distances."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        positions: Positions | None = "rotary",
        base: float = 10_000.0,
    ) -> None:
        """Makes the projections.

        Args:
            query_dim: Width of what asks, and of the result.
            context_dim: Width of what is looked at.
            num_heads: H.
            head_dim: C.
            positions: None: distances are not known.
            base: Of the rotary frequencies or the sinusoids.
        """
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.positions, self.base = positions, base
        inner = num_heads * head_dim
        self.q = nn.Linear(query_dim, inner, bias=False)
        self.k = nn.Linear(context_dim, inner, bias=False)
        self.v = nn.Linear(context_dim, inner, bias=False)
        self.out = nn.Linear(inner, query_dim, bias=False)
        self.distance = nn.Linear(query_dim, inner, bias=False) if positions == "relative" else None

    def queries(self, x_BTD: Tensor, places: Places) -> Tensor:
        """[B, T, D] to rotated queries [B, H, T, C]."""
        return places.rotated(self._heads(self.q(x_BTD)))

    def keys(self, context_BSD: Tensor, places: Places) -> Tensor:
        """[B, S, D] to rotated keys [B, H, S, C]."""
        return places.rotated(self._heads(self.k(context_BSD)))

    def keys_values(self, context_BSD: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """[B, S, D] to rotated keys and values, each [B, H, S, C]."""
        return self.keys(context_BSD, places), self._heads(self.v(context_BSD))

    def weights(
        self, x_BTD: Tensor, own: Places, context_BSD: Tensor, keys: Places, keep_BS: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """How queries divide their attention among what they look at: [B, H, T, S], which the fast kernels do not give away.

        Args:
            x_BTD: What asks, and `own`, its places.
            own: See there.
            context_BSD: What is looked at, and `keys`, its places.
            keys: See there.
            keep_BS: True where it may be seen; a row that may see nothing has equal weights.
            dtype: Of logits and weights.
        """
        q_BHTC = self.queries(x_BTD, own)
        logits_BHTS = (q_BHTC @ self.keys(context_BSD, keys).mT).to(dtype) / math.sqrt(self.head_dim)
        bias_BHTS = self.bias(q_BHTC, own, keys)
        if bias_BHTS is not None:
            logits_BHTS = logits_BHTS + bias_BHTS
        return logits_BHTS.masked_fill(~keep_BS[:, None, None, :], torch.finfo(dtype).min).softmax(dim=-1)

    def merge(self, y_BHTC: Tensor) -> Tensor:
        """Heads back together and through the output projection: [B, T, D]."""
        out: Tensor = self.out(y_BHTC.transpose(1, 2).flatten(2))
        return out

    def bias(self, q_BHTC: Tensor, queries: Places, keys: Places, *, causal: bool = False) -> Tensor | None:
        """What the distances add to the logits, [B, H, T, S]; None where attention is not relative.

        The logit of a query q and a key at distance d (the query's place minus the key's) gets q . W s(d), with the sinusoids s.
        Source: arXiv:1901.02860, section 3.3, without its two bias vectors.

        Args:
            q_BHTC: From `queries`.
            queries: Their places.
            keys: The keys' places.
            causal: Negative distances are masked anyway, and stand for 0 here.
        """
        if self.distance is None:
            return None
        low, high = queries.low - keys.high, queries.high - keys.low
        low = max(low, 0) if causal else low
        width = self.distance.in_features
        steps_J = torch.arange(low, high + 1, device=q_BHTC.device, dtype=torch.float64)
        exponents_D2 = torch.arange(0, width, 2, device=q_BHTC.device, dtype=torch.float64) / width
        angles_JD2 = steps_J[:, None] * self.base**-exponents_D2
        sinusoids_JD = torch.cat([angles_JD2.sin(), angles_JD2.cos()], dim=-1)[:, :width].to(q_BHTC.dtype)
        table_HCJ = self.distance(sinusoids_JD).view(-1, self.num_heads, self.head_dim).permute(1, 2, 0)
        of_distance_BHTJ = torch.matmul(q_BHTC, table_HCJ) / math.sqrt(self.head_dim)
        index = (queries.at_T[..., :, None] - keys.at_T[..., None, :] - low).clamp(0, high - low)
        index = index[:, None] if index.ndim == 3 else index
        return torch.take_along_dim(of_distance_BHTJ, index.expand(*q_BHTC.shape[:3], -1), dim=-1)

    def _heads(self, x_BTI: Tensor) -> Tensor:
        B, T, _ = x_BTI.shape
        return x_BTI.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)


def causal_within(segment_BT: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """For flex attention: whether query q of row b may see key k."""

    def visible(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (segment_BT[b, q] == segment_BT[b, k])

    return visible


class CausalMask(NamedTuple):
    """Which slot of a sequence may see which: those of the same segment that are not later."""

    dense_B1TT: Tensor | None = None
    """True where a slot may see another one."""
    block: BlockMask | None = None
    """For flex attention, which never holds T x T values."""
    runs: list[list[int]] | None = None
    """Of each row the lengths of its segments, one after the other. Nothing of all this: every earlier slot is seen."""

    @classmethod
    def of(cls, segment_BT: Tensor, *, dense: bool) -> "CausalMask":
        """Segments: equal numbers that stand side by side see each other.

        A slot sees itself at least, so that no row is empty; what it sees is zero where it is an empty slot.

        Args:
            segment_BT: int64.
            dense: Make the mask itself, also where there is something better.
        """
        B, T = segment_BT.shape
        if segment_BT.is_cuda and not dense:
            block = create_block_mask(causal_within(segment_BT), B, None, T, T, device=segment_BT.device)
            return cls(block=block)
        if not dense and not torch.compiler.is_compiling():
            changes = (segment_BT[:, 1:] != segment_BT[:, :-1]).cpu()
            if not changes.any():
                return cls()
            if T > DENSE_SLOTS:
                ends = [[*(row.nonzero()[:, 0] + 1).tolist(), T] for row in changes]
                return cls(runs=[[end - start for start, end in zip([0, *row], row, strict=False)] for row in ends])
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=segment_BT.device).tril()
        return cls((segment_BT[:, None, :, None] == segment_BT[:, None, None, :]) & causal_TT, None)

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, bias_BHTT: Tensor | None) -> Tensor:
        if self.block is not None:
            y_BHTC: Tensor = _flex()(q_BHTC, k_BHTC, v_BHTC, block_mask=self.block)
            return y_BHTC
        if self.runs is not None:
            # Only what may be seen is computed: T^2 of a sequence becomes the sum of its segments' squares.
            rows = []
            for lengths, *row in zip(
                self.runs, *(torch.split(x_BHTC, 1) for x_BHTC in (q_BHTC, k_BHTC, v_BHTC)), strict=True
            ):
                parts = zip(*(torch.split(x_1HTC, lengths, dim=2) for x_1HTC in row), strict=True)
                made = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
                rows.append(torch.cat(made, dim=2))
            return torch.cat(rows)
        if self.dense_B1TT is None:
            return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        mask = self.dense_B1TT if bias_BHTT is None else bias_BHTT.masked_fill(~self.dense_B1TT, -torch.inf)
        return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _flex() -> Callable[..., Any]:
    """Uncompiled, flex attention would hold all T x T values; inside a compiled network it is compiled with it."""
    flex: Callable[..., Any] = flex_attention
    return flex if torch.compiler.is_compiling() else _compiled_flex()
