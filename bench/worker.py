"""A bundle on the CPU as a worker of end_to_end.py and language.py: the protocol of worker_reference.py.

    worker.py BUNDLE THREADS [DEVICE]

A request may ask to reuse what earlier ones computed ({"reuse": true}); the answer has "stages", ms each, too, and
"outside", the part of each decode that is not spent in ONNX Runtime.
"""

import json
import sys
import time
from itertools import pairwise

from process import peak

import ppexport
from ppexport.runtime.backends.ort import OrtBinding

inside: list[float] = []  # seconds of each run of a graph


def timed(binding: OrtBinding, run=OrtBinding.run) -> None:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    run(binding)
    inside.append(time.perf_counter() - begin)


def main() -> None:
    OrtBinding.run = timed  # type: ignore[method-assign]
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    begin = time.perf_counter()
    pipe = ppexport.load(sys.argv[1], device, threads=int(sys.argv[2]))
    print(json.dumps({"ready": True, "load": (time.perf_counter() - begin) * 1e3, "rss": peak()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if not request.get("reuse"):
            pipe.engine.forget()
        stats, times, tokens = ppexport.Stats(), [], []
        images = [request["image"]] if request["image"] else []
        prune = ppexport.PixelPrune() if request["prune"] else None
        steps = pipe.generate_tokens(request["ids"], images, prune, request["tokens"], stats=stats, stop=())
        for step in steps:
            times.append(time.perf_counter())
            tokens.append(step.token)
        decode = [(b - a) * 1e3 for a, b in pairwise(times)]
        runs = inside[len(inside) - len(decode) :]
        answer = {
            "preprocess": stats.milliseconds.get("image", 0.0),
            "first": stats.ttft - stats.milliseconds.get("image", 0.0),
            "decode": decode,
            "outside": [ms - run * 1e3 for ms, run in zip(decode, runs, strict=True)],
            "tokens": tokens,
            "rss": peak(),
            "stages": stats.milliseconds,
            "kept": stats.kept,
            "total": stats.total,
            "prompt": stats.prompt_tokens,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
