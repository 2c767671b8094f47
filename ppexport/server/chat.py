"""Answers as OpenAI's API writes them, whole and in a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..run import view_as_dict
from ..runtime.pipeline import Pipeline
from ..runtime.stats import Stats
from .protocol import ChatRequest
from .service import Piece, Run, Top


class ChatWriter:
    """Writes one answer. ``name``: of the bundle; ``chat``: the request, ``run``: how it goes."""

    def __init__(self, pipe: Pipeline, name: str, chat: ChatRequest, run: Run):
        self.pipe = pipe
        self.name = name
        self.chat = chat
        self.run = run
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer when all of it is there."""
        text = "".join(piece.text for piece in pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs([top for piece in pieces for top in piece.tops]),
            "finish_reason": finish_reason(self._stats),
        }
        found = {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}
        return {**found, "ppexport": details(self._stats, self.run)}

    def first(self) -> dict[str, Any]:
        """The chunk that a stream begins with."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None}, None)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A part of the answer in a stream."""
        return self._chunk({"content": piece.text}, self._logprobs(piece.tops))

    def last(self) -> list[dict[str, Any]]:
        """The chunks that a stream ends with."""
        end = self._chunk({}, None, finish_reason(self._stats))
        end["ppexport"] = details(self._stats, self.run)
        if self.chat.stream_options is None or not self.chat.stream_options.include_usage:
            return [end]
        return [end, {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}]

    @property
    def _stats(self) -> Stats:
        assert self.run.stats is not None
        return self.run.stats

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _chunk(self, delta: dict[str, Any], logprobs: Any, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, tops: Sequence[Top]) -> dict[str, Any] | None:
        if not self.chat.logprobs:
            return None

        def one(token: int, logprob: float) -> dict[str, Any]:
            assert self.pipe.text is not None
            text = str(self.pipe.text.tokenizer.decode([token], skip_special_tokens=False))
            # what never comes is -9999 there
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8"))}

        content = [
            {**one(top.token, top.logprob), "top_logprobs": [one(*other) for other in top.others]}
            for top in tops
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, Any]:
        stats = self._stats
        dropped: dict[str, int] = {}
        for image in stats.images:
            for each in image.dropped:
                dropped[each.pruner] = dropped.get(each.pruner, 0) + each.tokens
        return {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.generated_tokens,
            "total_tokens": stats.prompt_tokens + stats.generated_tokens,
            "prompt_tokens_details": {
                "cached_tokens": stats.reused_tokens,
                "image_tokens": stats.kept,
                "pruned_tokens": stats.total - stats.kept,
                "pruned_by": dropped,
            },
        }


def finish_reason(stats: Stats) -> str:
    """As OpenAI has it: "stop", or "length" where the answer was cut."""
    return "stop" if stats.finish == "stop" else "length"


def details(stats: Stats, run: Run) -> dict[str, Any]:
    """What else there is to say of a request: times in milliseconds, and what was kept of each image."""
    return {
        "finish": stats.finish,
        "ttft_ms": round((run.first - run.arrived) * 1e3, 3),
        "total_ms": round((run.last - run.arrived) * 1e3, 3),
        "stages_ms": {name: round(ms, 3) for name, ms in stats.milliseconds.items()},
        "images": [view_as_dict(image) for image in stats.images],
    }
