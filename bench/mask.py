"""What an answer by a schema costs for each token: the mask of what may come next, at the size of a real vocabulary.

    python bench/mask.py -o bench/results/mask.json

A byte-pair vocabulary of 151936 made-up tokens, random logits, answers of up to 200 tokens; on one core.
"""

from __future__ import annotations

import itertools
import json
import string
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

from ppexport.runtime.grammar import Grammars

VOCAB = 151_936
FIELDS = {name: {"type": "string"} for name in ("vendor", "date", "total")}
ROW = {
    "type": "object",
    "properties": {"item": {"type": "string"}, "price": {"type": "number"}},
    "required": ["item"],
}
SCHEMAS = {
    "any object": {"type": "object"},
    "three fields": {
        "type": "object",
        "properties": FIELDS,
        "required": list(FIELDS),
        "additionalProperties": False,
    },
    "a table": {
        "type": "object",
        "properties": {"rows": {"type": "array", "items": ROW}},
        "required": ["rows"],
    },
    "a choice": {"enum": ["yes", "no", "not said"]},
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,8}$"},
}


def tokenizer(path: Path) -> None:
    """Bytes, pairs of letters, and pairs of those as far as the vocabulary goes."""
    base = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(each) for each in itertools.product(string.ascii_lowercase, repeat=2)]
    words = ["".join(each) for each in itertools.product(pairs, repeat=2)][
        : VOCAB - len(base) - len(pairs) - 1
    ]
    names = [*base, *pairs, *words, "<end>"]
    merges = [(pair[0], pair[1]) for pair in pairs] + [(word[:2], word[2:]) for word in words]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.save(str(path))


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--runs", default=5, show_default=True)
def main(output: Path, runs: int) -> None:
    """Measure and write a JSON file."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(Path(folder) / "tokenizer.json")
        begin = time.perf_counter()
        grammars = Grammars(Path(folder) / "tokenizer.json", VOCAB, [VOCAB - 1])
        once = time.perf_counter() - begin
        logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
        for name, schema in SCHEMAS.items():
            starts, tokens = [], []
            for run in range(runs):
                begin = time.perf_counter()
                grammar = grammars.grammar(schema)
                starts.append((time.perf_counter() - begin) * 1e3)
                rng = np.random.default_rng(run)
                for _ in range(200):
                    begin = time.perf_counter()
                    masked = grammar.masked(logits)
                    tokens.append((time.perf_counter() - begin) * 1e3)
                    allowed = np.flatnonzero(np.isfinite(masked))
                    token = int(rng.choice(allowed))
                    if token == VOCAB - 1 or grammar.take(token):
                        break
            row = {"schema": name, "start_ms": round(float(np.median(starts)), 2), "tokens": len(tokens)}
            row |= {f"p{n}_ms": round(float(np.percentile(tokens, n)), 3) for n in (50, 90, 99)}
            rows.append(row)
            click.echo(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe(), "vocabulary": VOCAB, "first_use_s": round(once, 2), "rows": rows}
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
