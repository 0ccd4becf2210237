"""lm-eval's local-completions on the held-out text against a running server; prints nll-based perplexities as JSON.

usage: lm_eval_perplexity.py BASE_URL MODEL_DIR HELD_OUT.u16 WORK_DIR

Writes WORK_DIR/windows.u16, whose windows of 512 tokens are what lm-eval scores (the beginning token and 511 of the
text), for `gqla score --perplexity` to score too.
"""

import array
import json
import math
import pathlib
import sys

import lm_eval
from tokenizers import Tokenizer

url, model, held_out, work = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
WINDOW, BEGIN = 512, 1
tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
ids = array.array("H")
ids.frombytes(pathlib.Path(held_out).read_bytes())

documents, windows = [], array.array("H")
for start in range(0, len(ids), 700):
    # A text whose tokens are known: decoding and encoding again settles where the cut made odd tokens.
    text = tokenizer.decode(list(ids[start : start + 700]))
    cut = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[: WINDOW - 1])
    tokens = tokenizer.encode(cut, add_special_tokens=False).ids
    if len(tokens) == WINDOW - 1:
        documents.append(cut)
        windows.extend([BEGIN, *tokens])
    if len(documents) == 12:
        break
assert len(documents) == 12, len(documents)
(work / "windows.u16").write_bytes(windows.tobytes())
(work / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))

task = {
    "task": "held_out",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(work / "text.jsonl")}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "process_results": lambda doc, results: {"nll": -results[0]},
    "metric_list": [{"metric": "nll", "aggregation": "mean", "higher_is_better": False}],
}
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": model.name,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(model),
        "max_length": 1024,
        "num_concurrent": 1,
        "batch_size": 4,
    },
    tasks=[task],
    bootstrap_iters=0,
)
nll = results["results"]["held_out"]["nll,none"]
print(json.dumps({"perplexity": math.exp(nll / (WINDOW - 1))}))
