"""Findings about `fan_in_fan_out`: whether the base keeps its weights as (in, out), like Conv1D.

It is one flag for all modules, and PEFT corrects it on load only where it sees the layer. A tool
that trusts a wrong one adds ΔW transposed: an error where the shapes differ, silence where a weight
is square.
"""

from __future__ import annotations

import re

from adapterops.basemodel.config import is_conv1d_name
from adapterops.checking.config import is_peft
from adapterops.checking.findings import Finding, Findings, finding, plural
from adapterops.formats import AdapterFile, Site

_CONV1D_BASES = re.compile(r"gpt-?2|dialogpt|openai-gpt|imagegpt", re.IGNORECASE)
_LARGEST_GPT2 = 1600  # its hidden size; Qwen 1 starts at 2048
# Leaves that only models made of Linear layers have.
_LINEAR = """
    q_proj k_proj v_proj o_proj out_proj gate_proj up_proj down_proj gate_up_proj qkv_proj
    query_key_value dense_h_to_4h dense_4h_to_h query key value Wqkv wq wk wv wo
"""


def by_name(file: AdapterFile) -> Findings:
    """`fan_in_fan_out` against families of models known by the names of their modules."""
    if not is_peft(file):
        return
    linear = [s for s in _weights(file) if s.stem.rpartition(".")[2] in _LINEAR.split()]
    transposed = _conv1d(file)
    flag = bool(file.config.get("fan_in_fan_out"))
    if flag and linear and not transposed:
        yield contradiction("fan-in-fan-out", flag, linear, "Linear layers, by their names")
    elif not flag and transposed and not linear:
        yield contradiction("fan-in-fan-out", flag, transposed, "GPT-2's Conv1D, by their names")


def contradiction(code: str, flag: bool, sites: list[Site], what: str) -> Finding:
    """A wrong flag, square modules said aloud: there it does harm without an error."""
    square = [site.stem for site in sites if site.shape[0] == site.shape[1]]
    which = f"{plural(len(sites), 'module')} are {what}"
    harm = f", {len(square)} of them square" if square else ""
    return finding(
        code,
        f"fan_in_fan_out is {str(flag).lower()}, and {which}{harm}",
        module=(square or [sites[0].stem])[0],
        hint="a tool that trusts the flag adds ΔW transposed"
        + (", to square weights without an error" if square else ""),
    )


def _weights(file: AdapterFile) -> list[Site]:
    """Sites whose orientation is a question at all."""
    return [s for s in file.sites.values() if s.dialect == "peft" and s.layer == "linear"]


def _conv1d(file: AdapterFile) -> list[Site]:
    """The sites that are Conv1D layers for certain."""
    named = [site for site in _weights(file) if is_conv1d_name(site.stem)]
    shapes = {s.shape for s in named if s.stem.endswith("attn.c_attn")}
    small = any(out == 3 * width and width <= _LARGEST_GPT2 for out, width in shapes)
    return named if small or _CONV1D_BASES.search(file.base or "") else []


CHECKS = (by_name,)
