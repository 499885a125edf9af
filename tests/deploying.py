"""A small fleet on disk with its index and a plan of it, made by hand for deployments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapterops.files.output import stage
from adapterops.fleet.indexing.store import Store
from adapterops.fleet.plans.plan import Kind, Plan, Representative, Served
from adapterops.fleet.plans.planfile import write_plan
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.types import Tenant
from adapterops.fleet.verifying.exact import compare
from tests.support import Pairs, pairs, write_peft

BASE = "org/tiny"
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (rows, 32)
    for layer in (0, 1)
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32))
}


def near(factors: Pairs, seed: int, error: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The adapter with noise of about that relative size on every B, of the same type."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, (B, A) in factors.items():
        noise = rng.standard_normal(B.shape)
        noise *= error * np.linalg.norm(B.astype(float)) / np.linalg.norm(noise)
        result[name] = ((B + noise).astype(B.dtype), A)
    return result


@dataclass
class Fleet:
    """Tenants' adapters below `root`/adapters, the index, and a plan."""

    root: Path
    factors: dict[str, Pairs] = field(default_factory=dict)
    served: dict[str, Served] = field(default_factory=dict)
    reps: dict[str, Representative] = field(default_factory=dict)
    max_error: float = 0.2

    def add(
        self,
        name: str,
        factors: Pairs,
        *,
        traffic: float = 1.0,
        alpha: float | None = None,
        **config: Any,
    ) -> Path:
        """Write a tenant's own adapter."""
        config = {"base_model_name_or_path": BASE, **config}
        self.factors[name] = factors
        folder = write_peft(self.home(name), factors, alpha=alpha, **config)
        self.served[name] = Served("", traffic=traffic)
        return folder

    def home(self, name: str) -> Path:
        return self.root / "adapters" / name

    def group(self, members: Sequence[str], kind: Kind = "original", path: Path | None = None):
        """Serve `members` by the first of them, or by the plan's own adapter at `path`."""
        if kind == "base":
            rep = Representative("base", "base", "", members=tuple(members))
            self.reps["base"] = rep
            for name in members:
                self.served[name] = replace(self.served[name], by="base")
            return
        own = path is not None
        place = path or self.home(members[0])
        found = signature(str(place), 0)
        assert found.status == "ok", found.reason
        each = "r-" + members[0]
        self.reps[each] = Representative(
            id=each,
            kind=kind,
            path=f"representatives/{place.name}" if own else str(place),
            location="" if own else str(place),
            members=tuple(members),
            holds=tuple(members) if own else (members[0],),
            rank=found.rank,
            size=found.size,
            dtype=found.dtype,
            dialect=found.dialect,
            base=found.base,
            content=found.content,
        )
        for name in members:
            error = compare(str(place), str(self.home(name)))
            sign = signature(str(self.home(name)), 0)
            self.served[name] = replace(
                self.served[name],
                by=each,
                error=error.error,
                missing=error.missing,
                foreign=error.foreign,
                worst=error.worst,
                norm=sign.norm,
                rank=sign.rank,
                size=sign.size,
            )

    def index(self) -> Path:
        """Write the index of all tenants."""
        place = self.root / "fleet"
        batch = []
        for name, served in sorted(self.served.items()):
            home = str(self.home(name))
            tenant = Tenant(name, home, home, served.traffic)
            batch.append((tenant, "1", signature(home, 0)))
        with Store.create(place, 0) as store:
            store.put(batch)
        return place

    def plan(self, name: str = "plan", **changes: Any) -> Path:
        """Write the plan; `changes` are other values of its fields."""
        if not (self.root / "fleet").exists():
            self.index()
        plan = Plan(
            fleet=str(self.root / "fleet"),
            seed=0,
            max_error=self.max_error,
            metric="frobenius",
            options={},
            served=self.served,
            representatives=self.reps,
        )
        plan = replace(plan, **changes)
        with stage(self.root / name, directory=True, overwrite=False) as staging:
            write_plan(staging, plan, [])
            kept = self.root / "representatives"
            if kept.exists():
                kept.rename(staging.path("representatives"))
        return self.root / name


def small(root: Path) -> Fleet:
    """a serves a and b, c and d serve themselves (d at rank 24), e changes nothing."""
    fleet = Fleet(root)
    a = pairs(1, SHAPES, 8, np.float16)
    fleet.add("a", a, traffic=1)
    fleet.add("b", near(a, 2, 0.05), traffic=2)
    fleet.add("c", pairs(3, SHAPES, 8, np.float16), traffic=10)
    fleet.add("d", pairs(4, SHAPES, 24, np.float16), alpha=48, traffic=0.5)
    fleet.add("e", {n: (0 * B, A) for n, (B, A) in a.items()}, traffic=1)
    fleet.group(["a", "b"])
    fleet.group(["c"])
    fleet.group(["d"])
    fleet.group(["e"], "base")
    return fleet


def resolved(folder: Path, name: str, base: str) -> bool:
    """Whether vLLM's filesystem resolver, as documented, finds an adapter for a base model."""
    config = folder / name / "adapter_config.json"
    if not config.exists():
        return False
    found: Mapping[str, Any] = json.loads(config.read_text())
    return found["peft_type"] == "LORA" and found["base_model_name_or_path"] == base
