"""A random checkpoint as llama.cpp's two files, model.gguf and mmproj.gguf in Q8_0.

    llama_convert.py LLAMA_CPP_SOURCE CHECKPOINT OUTPUT

LLAMA_CPP_SOURCE: vendor/llama.cpp of llama-cpp-python's source archive. Run with a Python that has torch and
transformers. The made-up tokenizer gets one merge, without which the converter sees no tokenizer, and is said to be of
the kind "qwen2", since it is not among those that the converter knows by their hash.
"""

import json
import logging
import runpy
import sys
import tempfile
from pathlib import Path

source, checkpoint, output = (Path(argument).resolve() for argument in sys.argv[1:])
sys.path[:0] = [str(source), str(source / "gguf-py")]
from conversion import base  # noqa: E402 (of llama.cpp, found by the path above)

logging.disable(logging.INFO)  # a line for each tensor
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
with tempfile.TemporaryDirectory() as name:
    copy = Path(name)
    for file in checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    text = copy / "tokenizer.json"
    found = json.loads(text.read_text(encoding="utf-8"))
    pair = list(found["model"]["vocab"])[:2]
    found["model"]["vocab"]["".join(pair)] = len(found["model"]["vocab"]) + len(found["added_tokens"])
    found["model"]["merges"] = [pair]
    text.unlink()
    text.write_text(json.dumps(found), encoding="utf-8")
    output.mkdir()
    for arguments in (["--outfile", "model.gguf"], ["--mmproj", "--outfile", "mmproj.gguf"]):
        arguments[-1] = str(output / arguments[-1])
        sys.argv = ["convert_hf_to_gguf.py", str(copy), "--outtype", "q8_0", *arguments]
        runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
