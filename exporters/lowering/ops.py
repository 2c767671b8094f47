"""The operations whose ONNX form differs between dialects.

Each function runs eagerly as written below; under ``torch.onnx.export`` it becomes one node of the domain
"ppexport", which ``dialects.py`` replaces by the nodes of the chosen dialect. Dimension letters: models/config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DOMAIN = "ppexport"
Watcher = Callable[[str, Tensor], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, ``watcher(what, x)`` is called with every value that ``watch`` names."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def watch(what: str, x: Tensor) -> Tensor:
    """``x`` itself, shown to the watcher if there is one: how large values get (exporters/fp16_range.py)."""
    if not torch.compiler.is_exporting() and (watcher := _watcher.get()) is not None:
        watcher(what, x)
    return x


def _node(name: str, inputs: Sequence[Tensor], like: Sequence[Tensor], **attributes: Any) -> Sequence[Tensor]:
    """Emit one node of the domain "ppexport"; output i has the dtype and shape of ``like[i]``."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        inputs,
        attributes,
        dtypes=[x.dtype for x in like],
        shapes=[x.shape for x in like],
        version=1,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Full (not causal) attention. q, k, v [B, S, heads, Dh] -> [B, S, heads, Dh].

    ``mask`` bool [B, S] says which keys are real, at least one in each row.
    """
    if torch.compiler.is_exporting():
        return _node("Attention", (q, k, v) if mask is None else (q, k, v, mask), (q,), scale=scale)[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keys = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale).transpose(1, 2)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    own: Tensor,
    entries: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention over a cache of fixed capacity.

    q [B, S, heads, Dh]; k, v [B, S, kv_heads, Dh]; caches [B, kv_heads, M, Dh]; own int32 [B, S], the cache entry that
    each token is written to (consecutive in a row); entries int32 [M], 0 ... M - 1. A token sees the entries up to its
    own. Returns the output [B, S, heads, Dh] and the two updated caches.
    """
    if torch.compiler.is_exporting():
        out, new_k, new_v = _node(
            "CachedAttention", (q, k, v, k_cache, v_cache, own, entries), (q, k_cache, v_cache), scale=scale
        )
        return out, new_k, new_v
    where = own.long()[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
    new_k = k_cache.scatter(2, where, k.transpose(1, 2).to(k_cache.dtype))
    new_v = v_cache.scatter(2, where, v.transpose(1, 2).to(v_cache.dtype))
    mask = entries <= own[:, None, :, None]
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (new_k, new_v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)
    return out.transpose(1, 2), new_k, new_v


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, the two halves of a head paired. x [B, S, heads, Dh]; cos, sin [B, S, Dh / 2] -> like x."""
    if torch.compiler.is_exporting():
        return _node("Rotary", (x, cos, sin), (x,))[0]
    first, second = x.chunk(2, dim=-1)
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis, computed in float32. x [..., D]; weight [D] -> like x."""
    if torch.compiler.is_exporting():
        return _node("RMSNorm", (x, weight), (x,), epsilon=eps)[0]
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, exact ("none") or by the tanh formula ("tanh"). x [...] -> like x."""
    if torch.compiler.is_exporting():
        return _node("Gelu", (x,), (x,), approximate=approximate)[0]
    return F.gelu(x, approximate=approximate)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU approximated by a sigmoid, x * sigmoid(1.702 x). x [...] -> like x."""
    if torch.compiler.is_exporting():
        return _node("QuickGelu", (x,), (x,))[0]
    return x * torch.sigmoid(1.702 * x)
