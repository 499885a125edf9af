"""Collect what the inputs of a model's modules look like, for `adapterops compress --activations`.

    python collect_activations.py docs --adapter adapters/docs-seed0 -o docs.safetensors
    python collect_activations.py text.txt --model FOLDER --modules '.*proj' -o text.safetensors

The base model reads the text; for each module that the adapter targets, or whose path matches the
regular expression, the file gets the second moments E[xxᵀ] of its inputs, or with `--samples K`
the inputs of K tokens drawn at random. The text is a file, or `code` or `docs`: what the example
adapters were trained on. Modules that read the same tensor (q, k, v) are collected once.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapterops import open_adapter
from adapterops.activations import write_activations
from adapterops.metric import Kind

Batch = tuple[torch.Tensor, torch.Tensor]  # token numbers and the attention mask
Take = Callable[[str, torch.Tensor], None]


def load(folder: str | None, name: str | None) -> tuple[Any, Any, str]:
    """The model, its tokenizer and the name that adapters call it by."""
    if folder is None:
        import smollm2

        return smollm2.load_model(), smollm2.load_tokenizer(), name or smollm2.HUB_NAME
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer, name or Path(folder).resolve().name


def read_text(text: str) -> list[str]:
    """The documents of an example's domain, or one file."""
    if text in ("code", "docs"):
        import train_adapters

        return train_adapters.split_documents(train_adapters.read_documents(text))[0]
    return [Path(text).read_text("utf-8")]


def chosen_modules(model: Any, adapter: str | None, pattern: str | None) -> dict[str, Any]:
    """path -> module, of those with a weight matrix that is multiplied with its input."""
    layers = {
        path: module
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not isinstance(module, torch.nn.Embedding)
    }
    if adapter is not None:
        stems = list(open_adapter(adapter))
        missing = [stem for stem in stems if stem not in layers]
        if missing:
            raise SystemExit(
                f"the model has no linear module {missing[0]} ({len(missing)} missing)"
            )
        return {stem: layers[stem] for stem in stems}
    found = {path: each for path, each in layers.items() if re.fullmatch(pattern or ".*", path)}
    if not found:
        raise SystemExit(f"no linear module matches {pattern}; there is {next(iter(layers))}")
    return found


def to_batches(texts: list[str], tokenizer: Any, length: int, rows: int, most: int) -> list[Batch]:
    """At most `most` tokens, taken evenly from the documents, in rows of at most `length`."""
    blocks = []
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        blocks += [tokens[at : at + length] for at in range(0, len(tokens), length)]
    step = max(1, sum(map(len, blocks)) // most)
    blocks = blocks[::step][: max(1, most // length)]
    batches = []
    for start in range(0, len(blocks), rows):
        part = blocks[start : start + rows]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        batches.append((ids, mask))
    return batches


def run(model: Any, modules: dict[str, Any], batch: Batch, take: Take) -> None:
    """Run the model once; `take(path, input)` is called whenever a module is."""
    hooks = [
        module.register_forward_pre_hook(lambda _, given, path=path: take(path, given[0]))
        for path, module in modules.items()
    ]
    body = set(model.base_model.modules())
    part = model.base_model if body.issuperset(modules.values()) else model  # the head is costly
    try:
        with torch.inference_mode():
            part(input_ids=batch[0], attention_mask=batch[1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def groups(
    model: Any, modules: dict[str, Any], batch: Batch
) -> tuple[dict[str, str], dict[str, int]]:
    """path -> the first module that is given the very same tensor; how wide the different are."""
    calls: list[tuple[str, torch.Tensor]] = []  # keeps the tensors alive, or ids would come again
    first: dict[int, str] = {}
    few = batch[0][:1, :8], batch[1][:1, :8]
    run(model, modules, few, lambda path, given: calls.append((path, given)))
    if len(calls) != len(modules):
        raise SystemExit(f"{len(modules)} modules were called {len(calls)} times in one pass")
    leader = {path: first.setdefault(id(given), path) for path, given in calls}
    return leader, {path: given.shape[-1] for path, given in calls if leader[path] == path}


def collect(
    model: Any, modules: dict[str, Any], batches: list[Batch], samples: int, seed: int
) -> dict[str, torch.Tensor]:
    """Second moments in float64, or the inputs of the same random tokens for every module."""
    total = sum(int(mask.sum()) for _, mask in batches)
    if samples > total:
        raise SystemExit(f"--samples {samples}: the text has {total} tokens")
    drawn = torch.zeros(total, dtype=torch.bool)
    drawn[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:samples]] = True
    moments: dict[str, torch.Tensor] = {}
    kept: dict[str, list[torch.Tensor]] = defaultdict(list)
    done = 0
    for batch in batches:
        real = batch[1].bool()  # padding is no input
        here = drawn[done : done + int(real.sum())]

        def take(path: str, given: torch.Tensor, real: Any = real, here: Any = here) -> None:
            rows = given[real]
            if samples:
                kept[path].append(rows[here])
                return
            wide = rows.double()
            moment = moments.setdefault(path, torch.zeros(wide.shape[1], wide.shape[1]).double())
            moment.addmm_(wide.mT, wide)

        run(model, modules, batch, take)
        done += len(here)
        print(f"  {done} of {total} tokens", flush=True)
    if samples:
        return {path: torch.cat(rows) for path, rows in kept.items()}
    return {path: moment / total for path, moment in moments.items()}


def save(
    out: str | Path,
    model: Any,
    modules: dict[str, Any],
    batches: list[Batch],
    *,
    name: str,
    samples: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Collect and write an activation file; says beforehand how much memory that takes."""
    leader, widths = groups(model, modules, batches[0])
    own = {path: modules[path] for path in widths}
    need = sum(4 * n * samples if samples else 8 * n * n for n in widths.values())
    print(f"{len(modules)} modules with {len(own)} different inputs: {need / 1e6:.0f} MB of memory")
    kind: Kind = "samples" if samples else "gram"
    values = collect(model, own, batches, samples, seed)
    write_activations(
        out,
        {path: (kind, found.numpy()) for path, found in values.items()},
        tokens=sum(int(mask.sum()) for _, mask in batches),
        model=name,
        shared={path: first for path, first in leader.items() if first != path},
        overwrite=overwrite,
    )
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("text", help="a text file; code or docs: the examples' training texts")
    parser.add_argument("-o", "--output", required=True, help="file to write")
    parser.add_argument("--model", help="folder of a transformers model; default SmolLM2-135M")
    parser.add_argument("--name", help="the model's name in the file; default the folder's")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", help="collect for the modules of this adapter")
    which.add_argument("--modules", help="collect for modules whose path this regex matches")
    parser.add_argument("--samples", type=int, default=0, help="keep K inputs, not the moments")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="read at most so many (default: 4096)"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens in a row (default: 128)")
    parser.add_argument("--batch", type=int, default=4, help="rows at a time (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer, name = load(options.model, options.name)
    modules = chosen_modules(model, options.adapter, options.modules)
    texts = read_text(options.text)
    batches = to_batches(texts, tokenizer, options.length, options.batch, options.tokens)
    save(
        options.output,
        model,
        modules,
        batches,
        name=name,
        samples=options.samples,
        seed=options.seed,
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    main()
